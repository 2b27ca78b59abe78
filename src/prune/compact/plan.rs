//! A net as layers that read and write signals, and the signals' constants.

use super::layer::Layer;
use super::{Norm, Stage, Weights, host};
use crate::nn::Conv2dConfig;
use candle_core::{DType, Device, Result, Tensor, bail};

/// What goes from one stage to the next: channels, of which each is one of a space's.
pub(super) struct Signal {
    pub space: usize,
    form: Form,
    /// Where it comes from, for messages.
    from: String,
    /// The values of the channels that are the same for all inputs.
    constant: Vec<Option<f64>>,
}

/// The shape of a signal.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Form {
    /// Of the inputs, until a layer takes them.
    Any,
    /// `[n, c, h, w]`
    Maps,
    /// `[n, c h w]`
    Pixels,
    /// `[n, c]`
    Features,
}

impl Form {
    fn shape(self) -> &'static str {
        match self {
            Self::Any => "inputs of any shape",
            Self::Maps => "[n, c, h, w]",
            Self::Pixels => "[n, c h w]",
            Self::Features => "[n, c]",
        }
    }
}

/// What reads signals and writes one, in an order in which all that is read has been written.
pub(super) enum Op {
    /// Layer, read, written.
    Layer(usize, usize, usize),
    /// Norm, read, written.
    Norm(usize, usize, usize),
    /// Each channel from that of the same number: read, written.
    Same(usize, usize),
    /// The sum of two: read, read, written.
    Sum(usize, usize, usize),
}

/// A norm's factors, offsets, means and variances.
pub(super) struct NormState {
    pub parts: [Vec<f64>; 4],
    pub writes: usize,
}

/// Channels that live or die together have one number: those of a space.
pub(super) struct Plan {
    pub signals: Vec<Signal>,
    pub ops: Vec<Op>,
    pub layers: Vec<Layer>,
    pub norms: Vec<NormState>,
    pub output: usize,
    /// The space that each is a part of, or itself.
    parents: Vec<usize>,
    /// Channels of each space.
    widths: Vec<usize>,
    /// Of the last layer.
    dtype: DType,
    /// What the layer before the norm that comes next would have had added to its bias.
    shift: Option<Vec<f64>>,
}

/// The signal of the inputs.
pub(super) const INPUT: usize = 0;

impl Plan {
    pub fn of(stages: &[Stage]) -> Result<Self> {
        let Some((first, width)) = stages.iter().position(Stage::has_channels).zip(width(stages)) else {
            bail!("compact: expected at least one layer with weights")
        };
        let mut plan = Self {
            signals: vec![],
            ops: vec![],
            layers: vec![],
            norms: vec![],
            output: INPUT,
            parents: vec![],
            widths: vec![],
            dtype: DType::F64,
            shift: None,
        };
        let space = plan.space(width);
        let form = match stages[..first].iter().any(|s| matches!(s, Stage::Flatten | Stage::GlobalAvgPool)) {
            true => Form::Features,
            false => Form::Any,
        };
        plan.signal(space, form, format!("inputs of {width} channels"), vec![None; width]);
        let last = stages.iter().rposition(Stage::has_channels).unwrap_or(first);
        plan.output = plan.walk(stages, first..last + 1, INPUT, "")?;
        if plan.layers.is_empty() {
            bail!("compact: expected at least one layer with weights")
        }
        // What comes after the last layer is done to all its units.
        Ok(plan)
    }

    pub fn space_of(&self, signal: usize) -> usize {
        self.root(self.signals[signal].space)
    }

    /// The channels of each space; none for those that are parts of others.
    pub fn widths(&self) -> Vec<usize> {
        let width = |space: usize| if self.root(space) == space { self.widths[space] } else { 0 };
        (0..self.widths.len()).map(width).collect()
    }

    fn root(&self, mut space: usize) -> usize {
        while self.parents[space] != space {
            space = self.parents[space];
        }
        space
    }

    fn space(&mut self, width: usize) -> usize {
        self.parents.push(self.parents.len());
        self.widths.push(width);
        self.parents.len() - 1
    }

    fn signal(&mut self, space: usize, form: Form, from: String, constant: Vec<Option<f64>>) -> usize {
        self.signals.push(Signal { space, form, from, constant });
        self.signals.len() - 1
    }

    /// Signals through `stages[range]`, of which `at` is the first one's; the last one's.
    fn walk(
        &mut self,
        stages: &[Stage],
        range: std::ops::Range<usize>,
        mut at: usize,
        within: &str,
    ) -> Result<usize> {
        for index in range {
            let stage = &stages[index];
            let place = format!("{within}stage {index} ({})", stage.kind());
            let normed = matches!(stages.get(index + 1), Some(Stage::BatchNorm(_)));
            at = match stage {
                Stage::Linear(weights) => self.layer(weights, None, at, normed)?,
                Stage::Conv(weights, config) => self.layer(weights, Some(config), at, normed)?,
                Stage::BatchNorm(norm) => self.norm(norm, at)?,
                Stage::Map(f) => {
                    let constant = self.mapped(*f, at, &place)?;
                    self.same(at, self.signals[at].form, constant)
                }
                Stage::MaxPool(..) | Stage::AvgPool(..) => self.pooled(at, Form::Maps, &place)?,
                Stage::GlobalAvgPool => self.pooled(at, Form::Features, &place)?,
                Stage::Flatten => {
                    let form = match self.signals[at].form {
                        Form::Features => Form::Features,
                        _ => Form::Pixels,
                    };
                    self.same(at, form, self.signals[at].constant.clone())
                }
                Stage::Residual { body, shortcut } => {
                    let part = |which: &str| format!("{within}stage {index}, {which}, ");
                    let sum = [
                        self.walk(body, 0..body.len(), at, &part("body"))?,
                        self.walk(shortcut, 0..shortcut.len(), at, &part("shortcut"))?,
                    ];
                    self.sum(sum, &place)?
                }
            };
        }
        Ok(at)
    }

    fn same(&mut self, at: usize, form: Form, constant: Vec<Option<f64>>) -> usize {
        let (space, from) = (self.signals[at].space, self.signals[at].from.clone());
        let next = self.signal(space, form, from, constant);
        self.ops.push(Op::Same(at, next));
        next
    }

    /// The mean or the largest of a constant is the constant.
    fn pooled(&mut self, at: usize, form: Form, place: &str) -> Result<usize> {
        let signal = &self.signals[at];
        if !matches!(signal.form, Form::Any | Form::Maps) {
            bail!("compact: {place} takes [n, c, h, w], got {} of {}", signal.form.shape(), signal.from)
        }
        Ok(self.same(at, form, signal.constant.clone()))
    }

    /// The constants that a function of each element makes.
    fn mapped(&self, f: fn(&Tensor) -> Result<Tensor>, at: usize, place: &str) -> Result<Vec<Option<f64>>> {
        /// Two numbers more, by which a function of several elements is found out.
        const PROBE: [f64; 2] = [0.75, -1.5];
        let constant = &self.signals[at].constant;
        let apply = |values: Vec<f64>| -> Result<Vec<f64>> {
            let count = values.len();
            let found = f(&Tensor::new(values, &Device::Cpu)?.to_dtype(self.dtype)?)?;
            if found.dims() != [count] {
                bail!("of {count} numbers it makes {:?}", found.dims())
            }
            host(&found)
        };
        let values = constant.iter().map(|value| value.unwrap_or(0.)).chain(PROBE).collect();
        let made = apply(values).and_then(|made| Ok((made, apply(PROBE.into_iter().rev().collect())?)));
        let (made, turned) = match made {
            Ok(made) => made,
            Err(error) => bail!(
                "compact: {place} is not a function of each element: {error}; pooling, norms and layers are stages of their own"
            ),
        };
        let (made, probe) = made.split_at(constant.len());
        let close =
            |(a, b): (&f64, &f64)| (a - b).abs() <= 1e-3 * a.abs() || a.is_nan() && b.is_nan() || a == b;
        if !probe.iter().zip(turned.iter().rev()).all(close) {
            bail!(
                "compact: {place} is not a function of each element: what it makes of one depends on others"
            )
        }
        Ok(constant.iter().zip(made).map(|(value, made)| value.map(|_| *made)).collect())
    }

    fn sum(&mut self, [a, b]: [usize; 2], place: &str) -> Result<usize> {
        let (spaces, signals) = ([a, b].map(|s| self.space_of(s)), [&self.signals[a], &self.signals[b]]);
        let [x, y] = signals.map(|signal| signal.form);
        let widths = spaces.map(|space| self.widths[space]);
        if widths[0] != widths[1] || (x != y && x != Form::Any && y != Form::Any) {
            bail!(
                "compact: {place} adds {} of {} to {} of {}, expected equal shapes",
                x.shape(),
                signals[0].from,
                y.shape(),
                signals[1].from
            )
        }
        let both = signals[0].constant.iter().zip(&signals[1].constant);
        let constant = both.map(|(a, b)| Some((*a)? + (*b)?)).collect();
        self.parents[spaces[1]] = spaces[0];
        let form = if x == Form::Any { y } else { x };
        let sum =
            self.signal(spaces[0], form, format!("the sum of {} units of {place}", widths[0]), constant);
        self.ops.push(Op::Sum(a, b, sum));
        Ok(sum)
    }

    fn norm(&mut self, norm: &Norm, at: usize) -> Result<usize> {
        let (signal, name) = (&self.signals[at], &norm.name);
        let count = signal.constant.len();
        let dims = [&norm.running_mean, &norm.running_var].into_iter();
        let dims = dims.chain(norm.affine.iter().flat_map(|(weight, bias)| [weight, bias]));
        if let Some(wrong) = dims.map(Tensor::dims).find(|dims| *dims != [count] || count == 0) {
            bail!("compact: BatchNorm {name}: expected [{count}] after {}, got {wrong:?}", signal.from)
        }
        if signal.form == Form::Pixels {
            bail!("compact: BatchNorm {name}: after Flatten of maps it is not supported, only before")
        }
        let [weight, bias, mean, var] = norm.parts()?;
        self.dtype = norm.running_mean.dtype();
        let shift = self.shift.take().unwrap_or_else(|| vec![0.; count]);
        let mean: Vec<f64> = mean.iter().zip(shift).map(|(mean, shift)| mean - shift).collect();
        let constant = (0..count).map(|i| match signal.constant[i] {
            _ if weight[i] == 0. => Some(bias[i]),
            Some(value) => Some((value - mean[i]) / (var[i] + norm.eps).sqrt() * weight[i] + bias[i]),
            None => None,
        });
        let (constant, space, form) = (constant.collect(), signal.space, signal.form);
        let next = self.signal(space, form, format!("BatchNorm {name} of {count} channels"), constant);
        self.ops.push(Op::Norm(self.norms.len(), at, next));
        self.norms.push(NormState { parts: [weight, bias, mean, var], writes: next });
        Ok(next)
    }

    fn layer(
        &mut self,
        weights: &Weights,
        config: Option<&Conv2dConfig>,
        at: usize,
        normed: bool,
    ) -> Result<usize> {
        let (signal, name, dims) = (&self.signals[at], &weights.name, weights.weight.dims());
        let groups = config.map_or(1, |config| config.groups);
        let rank = if config.is_some() { 4 } else { 2 };
        if dims.len() != rank || weights.weight.elem_count() == 0 || groups == 0 || dims[0] % groups != 0 {
            bail!(
                "compact: layer {name}: expected {rank} dimensions, none empty, in {groups} groups, got {dims:?}"
            )
        }
        let out = dims[0];
        if let Some(bias) = weights.bias.as_ref().filter(|bias| bias.dims() != [out]) {
            bail!("compact: layer {name}: expected a bias [{out}], got {:?}", bias.dims())
        }
        let count = signal.constant.len();
        let (wide, pixels) = (dims[1] * groups, signal.form == Form::Pixels);
        let taken = match config {
            Some(_) => matches!(signal.form, Form::Any | Form::Maps),
            None => signal.form != Form::Maps,
        };
        if !taken || (if pixels { wide % count != 0 } else { wide != count }) {
            bail!(
                "compact: layer {name} {dims:?} does not follow {}, which give {}",
                signal.from,
                signal.form.shape()
            )
        }
        let run = dims[2..].iter().product::<usize>() * wide / count;
        let bias = weights.bias.as_ref().map(host).transpose()?;
        let form = if config.is_some() { Form::Maps } else { Form::Features };
        let padded = config.is_some_and(|config| config.padding > 0);
        let space = self.space(out);
        let from = format!("layer {name} of {out} units");
        let next = self.signal(space, form, from, vec![]);
        let mut layer = Layer {
            weight: host(&weights.weight)?,
            bias,
            out,
            columns: count / groups,
            run,
            groups,
            reads: at,
            writes: next,
        };
        let shift = layer.fold(&self.signals[at].constant, padded);
        self.shift = match &mut layer.bias {
            Some(bias) => {
                bias.iter_mut().zip(shift).for_each(|(bias, shift)| *bias += shift);
                None
            }
            None if normed => Some(shift),
            None => {
                layer.bias = shift.iter().any(|&shift| shift != 0.).then_some(shift);
                None
            }
        };
        let constant = |row: usize| match layer.row(row).iter().all(|&w| w == 0.) {
            true => Some(layer.bias.as_ref().map_or(0., |bias| bias[row])),
            false => None,
        };
        self.signals[next].constant = (0..out).map(constant).collect();
        self.ops.push(Op::Layer(self.layers.len(), at, next));
        self.layers.push(layer);
        self.dtype = weights.weight.dtype();
        Ok(next)
    }
}

/// The channels that the first stage that has some takes.
fn width(stages: &[Stage]) -> Option<usize> {
    // Too few dimensions are refused with the layer.
    let columns = |weights: &Weights| weights.weight.dims().get(1).copied().unwrap_or(1);
    stages.iter().find_map(|stage| match stage {
        Stage::Linear(weights) => Some(columns(weights)),
        Stage::Conv(weights, config) => Some(columns(weights) * config.groups),
        Stage::BatchNorm(norm) => Some(norm.running_mean.elem_count()),
        Stage::Residual { body, shortcut } => width(body).or_else(|| width(shortcut)),
        _ => None,
    })
}
