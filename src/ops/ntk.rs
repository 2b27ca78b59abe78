//! A layer's part of a neural tangent kernel, and its trace against another matrix, from inner products.
//!
//! Rows and columns of a kernel are pairs (example, output), `each` outputs an example. Of a layer without shared positions, with
//! inputs `a_n` and output gradients `g_nc`, the part of the weight is `(a_n . a_m) (g_nc . g_md)` and that of the bias
//! `g_nc . g_md`: products of entries of two Gram matrices, of which that of the inputs is `each^2` times smaller. Kernels are
//! symmetric, and what is above the diagonal need not be right.

use candle_core::{CpuStorage, DType, InplaceOp2, InplaceOp3, Layout, Result, Tensor, WithDType, bail};
use rayon::prelude::*;

use super::ntk_host::{add_example, part, trace_example};
use super::record_layout::cpu_slice;
use crate::gpu::{Gpu, Grid, Module, args, typed};

/// Some rows of a Gram matrix `[size, size]`, from its first column on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Panel {
    /// The number of the first row.
    pub first: usize,
    /// Outputs of an example.
    pub each: usize,
}

/// Adds `(weight inputs + bias) grads` to rows of `m`, in place.
///
/// `m` `[size, size]` in f32 or f64, `grads` `[rows, columns]` for the rows from `panel.first` and the first columns, `inputs`
/// `[rows / each, columns / each]`, 1 without.
pub(crate) fn add(
    m: &Tensor,
    panel: Panel,
    grads: &Tensor,
    inputs: Option<&Tensor>,
    weight: f64,
    bias: f64,
) -> Result<()> {
    check(m, panel, grads, inputs)?;
    let grads = grads.contiguous()?;
    let inputs = inputs.map(Tensor::contiguous).transpose()?;
    if let Some(gpu) = Gpu::of(m.device()) {
        let (rows, columns) = grads.dims2()?;
        const ROWS: usize = 32_768;
        let grid = Grid::new([columns.div_ceil(THREADS as usize), rows.min(ROWS), 1], THREADS)?;
        return launch(
            &gpu,
            "ntk_add",
            grid,
            Call { m, panel, grads: &grads, inputs: inputs.as_ref(), weight, bias },
            0,
        );
    }
    let op = Add { panel, weight, bias };
    match &inputs {
        Some(inputs) => m.inplace_op3(&grads, inputs, &op),
        None => m.inplace_op2(&grads, &op),
    }
}

/// The sums over the symmetric matrices of `m grads inputs` and of `m grads`, of the rows of a panel: `[2]` in f64. The entries above
/// the diagonal are those below it.
pub(crate) fn traces(m: &Tensor, panel: Panel, grads: &Tensor, inputs: Option<&Tensor>) -> Result<Tensor> {
    check(m, panel, grads, inputs)?;
    let (m, grads) = (m.contiguous()?, grads.contiguous()?);
    let inputs = inputs.map(Tensor::contiguous).transpose()?;
    if let Some(gpu) = Gpu::of(m.device()) {
        const BLOCKS: usize = 1024;
        let blocks = grads.dim(0)?.clamp(1, BLOCKS);
        let partial = gpu.tensor((blocks, 2), DType::F64)?;
        let to = gpu.operand(&partial, NAME)?;
        let call = Call { m: &m, panel, grads: &grads, inputs: inputs.as_ref(), weight: 0., bias: 0. };
        launch(&gpu, "ntk_trace", Grid::line(blocks, THREADS)?, call, to.address())?;
        return partial.sum(0);
    }
    let sums = match m.dtype() {
        DType::F64 => cpu_traces::<f64>(&m, panel, &grads, inputs.as_ref())?,
        _ => cpu_traces::<f32>(&m, panel, &grads, inputs.as_ref())?,
    };
    Tensor::new(&sums, m.device())
}

const NAME: &str = "ntk";

fn check(m: &Tensor, panel: Panel, grads: &Tensor, inputs: Option<&Tensor>) -> Result<()> {
    let (size, wide) = m.dims2()?;
    let (rows, columns) = grads.dims2()?;
    let of_inputs = inputs.map(Tensor::dims2).transpose()?;
    let fit = size == wide
        && panel.each > 0
        && panel.first + rows <= size
        && columns <= size
        && [rows, columns, panel.first].iter().all(|n| n % panel.each == 0)
        && of_inputs.is_none_or(|dims| dims == (rows / panel.each, columns / panel.each))
        && matches!(m.dtype(), DType::F32 | DType::F64)
        && [Some(grads), inputs].into_iter().flatten().all(|t| t.dtype() == m.dtype());
    if !fit {
        bail!(
            "{NAME}: a kernel {:?} {:?} with {panel:?} does not fit gradients {:?} {:?} and inputs {:?}",
            m.dtype(),
            m.dims(),
            grads.dtype(),
            grads.dims(),
            of_inputs
        )
    }
    Ok(())
}

struct Add {
    panel: Panel,
    weight: f64,
    bias: f64,
}

impl Add {
    fn on_slices<T: WithDType>(
        &self,
        m: &mut [T],
        grads: &[T],
        inputs: Option<&[T]>,
        size: usize,
        columns: usize,
    ) {
        let Panel { first, each } = self.panel;
        let (weight, bias) = (T::from_f64(self.weight), T::from_f64(self.bias));
        let across = columns / each;
        let Some(m) = m.get_mut(first * size..first * size + grads.len() / columns.max(1) * size) else {
            return;
        };
        let examples = m.par_chunks_mut(each * size).zip(grads.par_chunks(each * columns)).enumerate();
        examples.for_each(|(example, (m, grads))| {
            let inputs = inputs.and_then(|inputs| inputs.get(example * across..(example + 1) * across));
            add_example(m, grads, inputs, [size, columns, each], [weight, bias]);
        });
    }

    fn run(
        &self,
        m: &mut CpuStorage,
        m_l: &Layout,
        grads: (&CpuStorage, &Layout),
        inputs: Option<(&CpuStorage, &Layout)>,
    ) -> Result<()> {
        let (size, columns) = (m_l.shape().dims2()?.1, grads.1.shape().dims2()?.1);
        let from = m_l.start_offset();
        match (m, grads.0, inputs.map(|i| i.0)) {
            (CpuStorage::F32(m), CpuStorage::F32(g), None) => {
                self.on_slices(&mut m[from..], part(g, grads.1), None, size, columns)
            }
            (CpuStorage::F64(m), CpuStorage::F64(g), None) => {
                self.on_slices(&mut m[from..], part(g, grads.1), None, size, columns)
            }
            (CpuStorage::F32(m), CpuStorage::F32(g), Some(CpuStorage::F32(i))) => {
                let inputs = inputs.map(|(_, layout)| part(i, layout));
                self.on_slices(&mut m[from..], part(g, grads.1), inputs, size, columns)
            }
            (CpuStorage::F64(m), CpuStorage::F64(g), Some(CpuStorage::F64(i))) => {
                let inputs = inputs.map(|(_, layout)| part(i, layout));
                self.on_slices(&mut m[from..], part(g, grads.1), inputs, size, columns)
            }
            _ => bail!("{NAME}: expected f32 or f64, all of one kind"),
        }
        Ok(())
    }
}

impl InplaceOp2 for Add {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, m: &mut CpuStorage, m_l: &Layout, g: &CpuStorage, g_l: &Layout) -> Result<()> {
        self.run(m, m_l, (g, g_l), None)
    }
}

impl InplaceOp3 for Add {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        m: &mut CpuStorage,
        m_l: &Layout,
        g: &CpuStorage,
        g_l: &Layout,
        i: &CpuStorage,
        i_l: &Layout,
    ) -> Result<()> {
        self.run(m, m_l, (g, g_l), Some((i, i_l)))
    }
}

fn cpu_traces<T: WithDType + Into<f64>>(
    m: &Tensor,
    panel: Panel,
    grads: &Tensor,
    inputs: Option<&Tensor>,
) -> Result<[f64; 2]> {
    let Panel { first, each } = panel;
    let (size, (_, columns)) = (m.dim(1)?, grads.dims2()?);
    let across = columns / each;
    let (m_s, m_l) = m.storage_and_layout();
    let (g_s, g_l) = grads.storage_and_layout();
    let held = inputs.map(Tensor::storage_and_layout);
    let m = part(cpu_slice::<T>(&m_s, NAME)?, m_l);
    let grads = part(cpu_slice::<T>(&g_s, NAME)?, g_l);
    let inputs = match &held {
        Some((storage, layout)) => Some(part(cpu_slice::<T>(storage, NAME)?, layout)),
        None => None,
    };
    let example_sums = |(example, grads): (usize, &[T])| {
        let at = first + example * each;
        let inputs = inputs.map(|inputs| &inputs[example * across..(example + 1) * across]);
        trace_example(&m[at * size..], grads, inputs, at, [size, columns, each])
    };
    // Summed in order, so that the result does not depend on the threads.
    let rows: Vec<[f64; 2]> =
        grads.par_chunks((each * columns).max(1)).enumerate().map(example_sums).collect();
    Ok(rows.iter().fold([0., 0.], |[w, b], [of_weight, of_bias]| [w + of_weight, b + of_bias]))
}

const THREADS: u32 = 256;

args! {
    struct NtkArgs {
        m: u64, grads: u64, inputs: u64, partial: u64, size: u64, first: u64, rows: u64, columns: u64, each: u64, weight: f64, bias: f64
    }
}

struct Call<'a> {
    m: &'a Tensor,
    panel: Panel,
    grads: &'a Tensor,
    inputs: Option<&'a Tensor>,
    weight: f64,
    bias: f64,
}

fn launch(gpu: &Gpu, kernel: &str, grid: Grid, call: Call<'_>, partial: u64) -> Result<()> {
    let (m, grads) = (gpu.operand(call.m, NAME)?, gpu.operand(call.grads, NAME)?);
    let inputs = call.inputs.map(|t| gpu.operand(t, NAME)).transpose()?;
    let (rows, columns) = call.grads.dims2()?;
    let args = NtkArgs {
        m: m.address(),
        grads: grads.address(),
        inputs: inputs.as_ref().map_or(0, |t| t.address()),
        partial,
        size: call.m.dim(1)? as u64,
        first: call.panel.first as u64,
        rows: rows as u64,
        columns: columns as u64,
        each: call.panel.each as u64,
        weight: call.weight,
        bias: call.bias,
    };
    gpu.launch(Module::Ntk, &typed(kernel, m.dtype)?, grid, &args)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, assert_emulated, random, values};

    /// `m`, gradients and inputs of a panel.
    fn operands(size: usize, each: usize, rows: usize, columns: usize) -> Result<[Tensor; 3]> {
        Ok([
            random(0, &[size, size])?,
            random(1, &[rows, columns])?,
            random(2, &[rows / each, columns / each])?,
        ])
    }

    const CASES: [(usize, Panel, usize, usize); 4] = [
        (12, Panel { first: 0, each: 3 }, 12, 12),
        (12, Panel { first: 6, each: 3 }, 6, 12),
        (12, Panel { first: 3, each: 3 }, 3, 6),
        (700, Panel { first: 100, each: 1 }, 300, 400),
    ];

    #[test]
    fn adds_and_traces_as_defined() -> Result<()> {
        for (size, panel, rows, columns) in CASES {
            let [m, g, i] = operands(size, panel.each, rows, columns)?;
            let [vm, vg, vi] = [values(&m)?, values(&g)?, values(&i)?];
            let input = |r: usize, c: usize| vi[r / panel.each * (columns / panel.each) + c / panel.each];
            let mut added = [vm.clone(), vm.clone()];
            let mut sums = [0., 0.];
            for r in 0..rows {
                for c in 0..columns {
                    let (at, g) = ((panel.first + r) * size + c, vg[r * columns + c]);
                    added[0][at] += (0.5 * input(r, c) - 2.) * g;
                    added[1][at] += (0.5 - 2.) * g;
                    let times = [2., 1., 0.][(c + 1).saturating_sub(panel.first + r).min(2)];
                    sums[0] += times * vm[at] * g * input(r, c);
                    sums[1] += times * vm[at] * g;
                }
            }
            let found = traces(&m, panel, &g, Some(&i))?;
            assert_close(&found, &sums, 1e-12);
            assert_close(&traces(&m, panel, &g, None)?, &[sums[1]; 2], 1e-12);
            for (inputs, expected) in [Some(&i), None].into_iter().zip(added) {
                let m = m.copy()?;
                add(&m, panel, &g, inputs, 0.5, -2.)?;
                assert_close(&m, &expected, 1e-14);
            }
        }
        Ok(())
    }

    #[test]
    fn kernels_agree_with_the_cpu() -> Result<()> {
        for dtype in [DType::F32, DType::F64] {
            for (size, panel, rows, columns) in CASES {
                let run = || {
                    let [m, g, i] = operands(size, panel.each, rows, columns)?;
                    let [m, g, i] = [m.to_dtype(dtype)?.copy()?, g.to_dtype(dtype)?, i.to_dtype(dtype)?];
                    let mut found = vec![traces(&m, panel, &g, Some(&i))?, traces(&m, panel, &g, None)?];
                    add(&m, panel, &g, Some(&i), 0.5, -2.)?;
                    add(&m, panel, &g, None, 0.5, 3.)?;
                    found.push(m);
                    Ok(found)
                };
                assert_emulated(run, if dtype == DType::F64 { 1e-13 } else { 1e-5 })?;
            }
        }
        Ok(())
    }

    #[test]
    fn refuses_what_does_not_fit() -> Result<()> {
        let [m, g, i] = operands(12, 3, 6, 12)?;
        let bad = [
            (Panel { first: 9, each: 3 }, &g, Some(&i)),
            (Panel { first: 0, each: 5 }, &g, None),
            (Panel { first: 0, each: 0 }, &g, None),
            (Panel { first: 0, each: 2 }, &g, Some(&i)),
        ];
        for (panel, g, i) in bad {
            for error in [add(&m, panel, g, i, 1., 1.).err(), traces(&m, panel, g, i).err()] {
                assert!(error.is_some_and(|e| e.to_string().contains("does not fit")));
            }
        }
        Ok(())
    }
}
