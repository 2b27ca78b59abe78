//! How strong a penalty should be: the factor whose prior has the variance that the weights are initialized with.
//!
//! Source: Wolinski, Charpiat, Ollivier, arXiv 2002.00178. With `N` examples and a loss that is a mean over them, a penalty of factor `lambda` in
//! the summed loss has the factor `lambda / N`. Its prior (see [`Prior`](super::Prior)) has the variance `v` of the
//! initialization for
//!
//! | penalty | `lambda` |
//! |---|---|
//! | `sum w^2` | `1 / 2v`: the prior's precision is `2 lambda` |
//! | `sum abs(w)` | `sqrt(2 / v)` |
//! | `sum norm(w_g)`, groups of `n` | `sqrt((n + 1) / v)` |
//! | `sum sqrt(n) norm(w_g)` | `sqrt((n + 1) / (n v))` |
//!
//! The paper's experiments are best at 0.01 to 0.1 of this prediction (the cold-posterior effect): the temperature
//! multiplies it, 1 by default.

use std::{fmt, str::FromStr};

use candle_core::{Error, Result, Shape, bail};

use super::Prior;

/// The variance that a layer's weights are initialized with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Init {
    /// `1 / fan_in` (LeCun, Bottou, Orr, Müller 1998).
    #[default]
    LeCun,
    /// `2 / (fan_in + fan_out)` (Glorot and Bengio 2010).
    Glorot,
    /// `2 / fan_in` (He, Zhang, Ren, Sun 2015).
    He,
}

impl Init {
    /// The variance for weights of shape `[out, in]` or, of a convolution, `[out, in, ..kernel]`, whose fans are `in` and
    /// `out` times the kernel's elements.
    ///
    /// # Errors
    /// For other shapes and empty ones: leave biases out.
    pub fn variance(self, shape: &Shape) -> Result<f64> {
        let [outputs, inputs, kernel @ ..] = shape.dims() else {
            bail!("variance of an initialization: expected weights [out, in, ..kernel], got {shape:?}")
        };
        if shape.elem_count() == 0 {
            bail!("variance of an initialization: the weights {shape:?} are empty")
        }
        let taps = kernel.iter().product::<usize>() as f64;
        let (fan_in, fan_out) = (*inputs as f64 * taps, *outputs as f64 * taps);
        Ok(match self {
            Self::LeCun => 1. / fan_in,
            Self::Glorot => 2. / (fan_in + fan_out),
            Self::He => 2. / fan_in,
        })
    }
}

/// What kind of penalty a factor is predicted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `sum w^2`.
    L2,
    /// `sum abs(w)`.
    L1,
    /// The norms of groups.
    GroupLasso {
        /// Weights of a group.
        size: usize,
        /// Whether each norm is multiplied by `sqrt(size)`.
        size_weighted: bool,
    },
}

impl Family {
    /// The factor, for a loss summed over the examples, whose prior has the given variance per weight.
    ///
    /// # Errors
    /// Unless the variance is positive and finite and groups have a weight.
    pub fn factor(self, variance: f64) -> Result<f64> {
        if !(variance.is_finite() && variance > 0.) {
            bail!("predicted factor: expected a positive finite variance, got {variance}")
        }
        Ok(match self {
            Self::L2 => 0.5 / variance,
            Self::L1 => (2. / variance).sqrt(),
            Self::GroupLasso { size: 0, .. } => bail!("predicted factor: the groups have no weights"),
            Self::GroupLasso { size, size_weighted } => {
                let n = size as f64;
                ((n + 1.) / variance / if size_weighted { n } else { 1. }).sqrt()
            }
        })
    }

    /// The prior of this penalty with that factor in a summed loss.
    ///
    /// # Errors
    /// As [`Prior`]'s constructors.
    pub fn prior(self, factor: f64) -> Result<Prior> {
        match self {
            Self::L2 => Prior::l2(factor),
            Self::L1 => Prior::l1(factor),
            Self::GroupLasso { size, size_weighted } => {
                Prior::group_lasso(factor * if size_weighted { (size as f64).sqrt() } else { 1. }, size)
            }
        }
    }
}

/// A penalty's factor in a loss that is a mean over the examples: a number, or predicted for each layer.
///
/// On the command line `0.001`, `auto` or, with a temperature, `auto:0.1`.
///
/// ```
/// use candle_core::{Result, Shape};
/// use kronwake::penalty::{Factor, Family, Init};
///
/// # fn main() -> Result<()> {
/// let (first, second) = (Shape::from((300, 784)), Shape::from((10, 300)));
/// let weights = [("fc1.weight", &first), ("fc2.weight", &second)];
/// let factor: Factor = "auto:0.1".parse()?;
/// // Groups are the rows of a layer.
/// let rows = |_: &str, shape: &Shape| Family::GroupLasso { size: shape.dims()[1], size_weighted: false };
/// let factors = factor.of_layers(&weights, rows, Init::LeCun, 60_000)?;
/// assert!((factors[0] - 0.1 * (785f64 * 784.).sqrt() / 60_000.).abs() < 1e-15);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Factor {
    /// The same for all layers.
    Value(f64),
    /// The prediction divided by the number of examples, times the temperature.
    Auto {
        /// 1 is the prediction itself.
        temperature: f64,
    },
}

impl Factor {
    /// The factors of `weights`, given by name and shape, in their order, for a mean loss over `examples`; `family` says
    /// which penalty a weight gets.
    ///
    /// # Errors
    /// With the weight's name where no prediction can be made, and where the number of examples is 0 or a factor negative or not finite.
    pub fn of_layers(
        self,
        weights: &[(&str, &Shape)],
        family: impl Fn(&str, &Shape) -> Family,
        init: Init,
        examples: usize,
    ) -> Result<Vec<f64>> {
        self.check()?;
        if examples == 0 {
            bail!("predicted factor: there are no examples")
        }
        let of_layer = |&(name, shape): &(&str, &Shape)| match self {
            Self::Value(value) => Ok(value),
            Self::Auto { temperature } => {
                let summed = init.variance(shape).and_then(|variance| family(name, shape).factor(variance));
                match summed {
                    Ok(factor) => Ok(temperature * factor / examples as f64),
                    Err(error) => bail!("weight {name}: {error}"),
                }
            }
        };
        weights.iter().map(of_layer).collect()
    }

    fn check(self) -> Result<()> {
        let (what, value) = match self {
            Self::Value(value) => ("factor", value),
            Self::Auto { temperature } => ("temperature", temperature),
        };
        if !(value.is_finite() && value >= 0.) {
            bail!("a penalty's {what}: expected zero or more, got {value}")
        }
        Ok(())
    }
}

impl FromStr for Factor {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let number = |digits: &str| match digits.trim().parse::<f64>() {
            Ok(value) => Ok(value),
            Err(_) => {
                bail!("a penalty's factor: expected a number, `auto` or `auto:temperature`, got {text:?}")
            }
        };
        let factor = match text.trim().strip_prefix("auto") {
            Some("") => Self::Auto { temperature: 1. },
            Some(rest) => Self::Auto { temperature: number(rest.strip_prefix(':').unwrap_or("none"))? },
            None => Self::Value(number(text)?),
        };
        factor.check()?;
        Ok(factor)
    }
}

impl fmt::Display for Factor {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Value(value) => write!(f, "{value}"),
            Self::Auto { temperature: 1. } => write!(f, "auto"),
            Self::Auto { temperature } => write!(f, "auto:{temperature}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_prior_has_the_variance(exponent in -20f64..20., size in 1usize..5000, kind in 0..4) {
            let variance = 10f64.powf(exponent);
            let family = match kind {
                0 => Family::L2,
                1 => Family::L1,
                _ => Family::GroupLasso { size, size_weighted: kind == 2 },
            };
            let prior = family.factor(variance).and_then(|factor| family.prior(factor)).unwrap();
            prop_assert!((prior.variance().unwrap() / variance - 1.).abs() < 1e-12);
        }
    }

    #[test]
    fn variances() -> Result<()> {
        let (linear, conv) = (Shape::from((300, 784)), Shape::from((16, 8, 3, 5)));
        for (init, of_linear, of_conv) in [
            (Init::LeCun, 1. / 784., 1. / 120.),
            (Init::Glorot, 2. / 1084., 2. / 360.),
            (Init::He, 2. / 784., 2. / 120.),
        ] {
            assert_eq!(init.variance(&linear)?, of_linear);
            assert_eq!(init.variance(&conv)?, of_conv);
        }
        assert!(Init::He.variance(&Shape::from(7)).is_err());
        assert!(Init::He.variance(&Shape::from((7, 0))).is_err());
        Ok(())
    }

    #[test]
    fn layers() -> Result<()> {
        let (fc, conv, bias) = (Shape::from((4, 50)), Shape::from((2, 5, 1, 2)), Shape::from(4));
        let weights = [("fc", &fc), ("conv", &conv)];
        let l2 = |_: &str, _: &Shape| Family::L2;
        let auto = Factor::Auto { temperature: 0.5 };
        // lambda = fan_in / 2, and for He's variance half of it.
        assert_eq!(auto.of_layers(&weights, l2, Init::LeCun, 100)?, [0.125, 0.025]);
        assert_eq!(auto.of_layers(&weights, l2, Init::He, 100)?, [0.0625, 0.0125]);
        let mixed = |name: &str, _: &Shape| if name == "fc" { Family::L1 } else { Family::L2 };
        assert_eq!(auto.of_layers(&weights, mixed, Init::LeCun, 1)?, [5., 2.5]);
        assert_eq!(Factor::Value(3.).of_layers(&weights, l2, Init::He, 9)?, [3., 3.]);
        let error = auto.of_layers(&[("fc.bias", &bias)], l2, Init::He, 9).unwrap_err().to_string();
        assert!(error.contains("fc.bias"), "{error}");
        assert!(auto.of_layers(&weights, l2, Init::He, 0).is_err());
        assert!(Factor::Value(-1.).of_layers(&weights, l2, Init::He, 1).is_err());
        let empty = |_: &str, _: &Shape| Family::GroupLasso { size: 0, size_weighted: true };
        assert!(auto.of_layers(&weights, empty, Init::He, 1).is_err());
        Ok(())
    }

    #[test]
    fn text() -> Result<()> {
        for (text, factor) in [
            ("auto", Factor::Auto { temperature: 1. }),
            ("auto:0.1", Factor::Auto { temperature: 0.1 }),
            ("0.25", Factor::Value(0.25)),
            ("0", Factor::Value(0.)),
        ] {
            assert_eq!(text.parse::<Factor>()?, factor);
            assert_eq!(factor.to_string(), text);
        }
        assert_eq!("1e-4".parse::<Factor>()?, Factor::Value(1e-4));
        for bad in ["", "auto:", "auto0.1", "autos", "auto:-1", "-1", "nan", "inf", "x"] {
            assert!(bad.parse::<Factor>().is_err(), "{bad}");
        }
        Ok(())
    }
}
