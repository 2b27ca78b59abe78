//! candle_nn under its own names, with gradients and taps.
//!
//! `use kronwake::nn as candle_nn` makes a model file trainable by the optimizers of this crate: everything of candle_nn is
//! here, and what has no gradient there, or holds weights that curvature wants to see, is replaced by a layer of the same
//! name and signature.
//!
//! ```
//! mod model {
//!     use kronwake::nn as candle_nn; // the one line that is new in this file
//!
//!     use candle_core::{Result, Tensor};
//!     use candle_nn::{Embedding, LayerNorm, Linear, Module, VarBuilder, embedding, layer_norm, linear};
//!
//!     pub struct Classifier(Embedding, LayerNorm, Linear);
//!
//!     impl Classifier {
//!         pub fn new(vb: VarBuilder) -> Result<Self> {
//!             let words = embedding(20, 8, vb.pp("words"))?;
//!             Ok(Self(words, layer_norm(8, 1e-5, vb.pp("norm"))?, linear(8, 2, vb.pp("out"))?))
//!         }
//!     }
//!
//!     impl Module for Classifier {
//!         fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
//!             self.2.forward(&self.1.forward(&self.0.forward(tokens)?)?)?.mean(1)
//!         }
//!     }
//! }
//!
//! use candle_core::{DType, Device, Module, Tensor};
//! use kronwake::nn::{Optimizer, VarBuilder, VarMap, loss::cross_entropy};
//! use kronwake::optim::{NaturalGradient, Params};
//! use kronwake::tape::{Likelihood, Tape};
//!
//! let (vars, tape) = (VarMap::new(), Tape::new());
//! let model = tape.build(|| model::Classifier::new(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu)))?;
//! // Or a checkpoint's tensors: Checkpoint::read(folder, &Device::Cpu)?.load_into(&vars)?
//! let mut opt = NaturalGradient::from_varmap(&vars, Params::kld_wrm(&tape))?;
//! let (tokens, classes) = (Tensor::new(&[[3u32, 1], [4, 2]], &Device::Cpu)?, Tensor::new(&[0u32, 1], &Device::Cpu)?);
//! for _ in 0..20 {
//!     let logits = model.forward(&tokens)?;
//!     opt.observe(&logits, Likelihood::Categorical)?;
//!     opt.backward_step(&cross_entropy(&logits, &classes)?)?;
//! }
//! assert_eq!(model.forward(&tokens)?.argmax(1)?.to_vec1::<u32>()?, [0, 1]);
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! Without a gradient stay what is of use in inference alone, [`attention::cpu_flash`], [`varlen_attention`], [`moe`] and
//! [`kv_cache::ScatteredKvCache`], and of candle's tensor methods, which no layer can replace, `max_pool2d` with windows that are not as large
//! as their stride ([`ops::max_pool2d`] has one) and `upsample_bilinear2d`. In half precision the methods `silu` and `gelu` have wrong gradients for
//! large inputs, which [`ops::silu`] and [`Activation`] do not. The first step refuses variables that get none, by name.
//! A [`BatchNorm`] keeps its statistics as variables too, which are not to be trained: freeze them, as
//! `Groups(vec![Group { frozen: true, ..Group::named("*running_*") }])` does. A recurrent layer over thousands of steps needs [`stack::deep`](crate::stack::deep).

pub mod activation;
pub mod attention;
pub mod batch_norm;
pub mod conv;
mod conv_transpose;
pub mod dropout;
pub mod embedding;
pub mod init;
pub mod kv_cache;
pub mod linear;
pub mod lora;
pub mod loss;
pub mod norm;
pub mod ops;
pub mod rnn;
pub mod rotary_emb;
mod weighted_loss;

pub use activation::Activation;
pub use batch_norm::{BatchNorm, batch_norm};
pub use candle_nn::*;
pub use conv::{Conv1d, Conv2d, conv1d, conv1d_no_bias, conv2d, conv2d_no_bias};
pub use conv_transpose::{ConvTranspose1d, conv_transpose1d, conv_transpose1d_no_bias};
pub use dropout::Dropout;
pub use embedding::{Embedding, embedding};
pub use linear::{Linear, linear, linear_b, linear_no_bias};
pub use lora::{Lora, ParamsLora};
// The function and, under candle's name, the module.
pub use norm::{
    self as layer_norm, LayerNorm, LayerNormConfig, RmsNorm, layer_norm, layer_norm_no_bias, rms_norm,
};
pub use rnn::{GRU, GRUConfig, LSTM, LSTMConfig, RNN, gru, lstm};

#[cfg(test)]
mod tests {
    use candle_core::{Result, Tensor, Var};

    use super::*;
    use crate::ops::testing::{check_gradients, random_var};

    fn vars(shapes: &[&[usize]]) -> Result<Vec<Var>> {
        shapes.iter().enumerate().map(|(stream, dims)| random_var(stream as u64, dims)).collect()
    }

    /// What is candle's own here has gradients; away from the kinks of the activations, where candle takes what it takes.
    #[test]
    fn gradients_of_candles_layers() -> Result<()> {
        use Activation::*;
        let x = vars(&[&[3, 8]])?;
        // candle's derivatives of these have constants of six digits: to 1e-6.
        for f in [Gelu, NewGelu, GeluPytorchTanh] {
            check_gradients(&x, |a| f.forward(&a[0])? / 100.);
        }
        for f in [
            Relu,
            Relu2,
            Relu6,
            Silu,
            Sigmoid,
            HardSigmoid,
            Swiglu,
            Swish,
            Mish,
            HardSwish,
            Elu(1.5),
            LeakyRelu(0.1),
        ] {
            check_gradients(&x, |a| f.forward(&a[0]));
        }
        check_gradients(&vars(&[&[2, 3, 4], &[3]])?, |a| PReLU::new(a[1].clone(), false).forward(&a[0]));
        check_gradients(&vars(&[&[2, 6, 3, 2], &[6], &[6]])?, |a| {
            GroupNorm::new(a[1].clone(), a[2].clone(), 6, 3, 1e-5)?.forward(&a[0])
        });
        let running =
            [Tensor::new(&[0.5f64, -1.], x[0].device())?, Tensor::new(&[2f64, 0.3], x[0].device())?];
        for train in [false, true] {
            check_gradients(&vars(&[&[3, 2, 2, 2], &[2], &[2]])?, |a| {
                let [mean, var] = running.clone();
                BatchNorm::new(2, mean, var, a[1].clone(), a[2].clone(), 1e-5)?.forward_t(&a[0], train)
            });
        }
        for (padding, output_padding, stride, dilation) in
            [(0, 0, 1, 1), (1, 1, 2, 1), (2, 0, 1, 2), (1, 0, 3, 2)]
        {
            let config = ConvTranspose2dConfig { padding, output_padding, stride, dilation };
            check_gradients(&vars(&[&[2, 2, 3, 4], &[2, 3, 3, 2], &[3]])?, |a| {
                ConvTranspose2d::new(a[1].clone(), Some(a[2].clone()), config).forward(&a[0])
            });
        }
        Ok(())
    }
}
