//! The kernel files, one module each.

macro_rules! modules {
    ($($module:ident $stem:literal)*) => {
        /// A kernel file.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub(crate) enum Module {
            $(#[doc = concat!("`kernels/", $stem, ".cu`")] $module,)*
        }

        impl Module {
            /// The file's name without its ending.
            #[cfg(any(test, feature = "cuda"))]
            pub fn stem(self) -> &'static str {
                match self {
                    $(Self::$module => $stem,)*
                }
            }

            /// What the compiler made of the file: code for several GPUs, of which the driver takes what fits, and PTX that it compiles
            /// for others.
            #[cfg(feature = "cuda")]
            pub fn code(self) -> &'static [u8] {
                match self {
                    $(Self::$module => include_bytes!(concat!(env!("OUT_DIR"), "/", $stem, ".fatbin")),)*
                }
            }
        }
    };
}

modules! {
    Bias "bias"
    Conv "conv"
    ConvPool "conv_pool"
    CrossEntropy "cross_entropy"
    Dropout "dropout"
    FactorBf16 "factor_bf16"
    FactorF16 "factor_f16"
    FactorF32 "factor_f32"
    FactorF64 "factor_f64"
    FactorTf32 "factor_tf32"
    Group "group"
    Grouped "grouped"
    Kron "kron"
    Mix "mix"
    Newton "newton"
    Norm "norm"
    Ntk "ntk"
    Patches "patches"
    Pool "pool"
    Precondition "precondition"
    Relu "relu"
    Rope "rope"
    Sample "sample"
    Softmax "softmax"
    Spatial "spatial"
    Spd "spd"
    Traces "traces"
    Update "update"
    Wake "wake"
}
