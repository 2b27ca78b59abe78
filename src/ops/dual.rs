//! The step of Lagrange multipliers, whose few numbers a group stay where the weights are.

use candle_core::{DType, Result, Tensor};

use super::element::Host;
use crate::gpu::{Gpu, Grid, Module, args};

/// A row of a state, which is `[Row::ALL.len(), groups]` in f64.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Row {
    /// The multiplier.
    Alpha,
    /// The integral of the excess.
    Integral,
    /// The average of the excess.
    Average,
    /// The factor of the quadratic term.
    Penalty,
    /// The least violation since the constraint held, or [`NONE`].
    Least,
    /// Steps since that fell by [`FALL`].
    Stalled,
}

impl Row {
    /// In their order.
    pub const ALL: [Self; 6] =
        [Self::Alpha, Self::Integral, Self::Average, Self::Penalty, Self::Least, Self::Stalled];

    /// `[groups]` of a state.
    pub fn of(self, state: &Tensor) -> Result<Tensor> {
        state.get(self as usize)
    }
}

/// `least` of a group that is not violated. A number that files hold.
pub(crate) const NONE: f64 = f64::MAX;

/// A violation counts from this part of bound or value on, so that rounding about the bound is none.
const LEAST: f64 = 1e-3;

/// A violation has fallen if it is less than this times the least one.
const FALL: f64 = 0.99;

/// How the numbers of a group follow its excess `e = omega - bound`, whose violation is `v = [e]_+`, of an equality `|e|`:
///
/// - `average <- nu average + (1 - nu) e`, from `e` on;
/// - `integral <- clip(integral + rate e)`, `alpha <- clip(kappa_p average + integral)`, where `rate` is `kappa_i` or the group's `penalty`, and
///   `clip` leaves what is in `[0, cap]`, of an equality `[-cap, cap]`;
/// - `penalty <- min(growth penalty, limit)` where `v > tolerance`;
/// - where `e < -restart`: all of them as if this were the first step, with a multiplier of zero.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DualStep {
    pub bound: f64,
    pub kappa_p: f64,
    pub kappa_i: f64,
    pub nu: f64,
    /// May be infinite, as `restart` and `limit` may.
    pub cap: f64,
    pub restart: f64,
    /// The factor of the quadratic term at first.
    pub penalty: f64,
    pub growth: f64,
    pub tolerance: f64,
    pub limit: f64,
    pub equality: bool,
    /// Whether the penalty is the rate.
    pub by_penalty: bool,
}

args! {
    struct DualArgs {
        omegas: u64, state: u64, next: u64, groups: u64, bound: f64, kappa_p: f64, kappa_i: f64, nu: f64, cap: f64, restart: f64, penalty: f64,
        growth: f64, tolerance: f64, limit: f64, equality: u64, by_penalty: u64, first: u64
    }
}

impl DualStep {
    /// The state after a step at `omegas`, `[groups]` in f64 on the state's device. On a GPU a group whose omega is NaN or infinite keeps its
    /// numbers; on the CPU the caller has refused it.
    pub fn run(&self, omegas: &Tensor, state: &Tensor, first: bool) -> Result<Tensor> {
        if let Some(gpu) = Gpu::of(omegas.device()).filter(|_| omegas.elem_count() > 0) {
            return self.on_device(&gpu, omegas, state, first);
        }
        let (omegas, old) = (Host::of(omegas), Host::of(state));
        let (omegas, old) = (omegas.values::<f64>()?, old.values::<f64>()?);
        let groups = omegas.len();
        let mut next = vec![0.; old.len()];
        for (group, omega) in omegas.iter().enumerate() {
            let rows = self.next(std::array::from_fn(|row| old[row * groups + group]), *omega, first);
            rows.into_iter().enumerate().for_each(|(row, value)| next[row * groups + group] = value);
        }
        Tensor::from_vec(next, state.dims(), state.device())
    }

    /// As the kernel.
    fn next(&self, rows: [f64; Row::ALL.len()], omega: f64, first: bool) -> [f64; Row::ALL.len()] {
        let [_, integral, average, penalty, least, stalled] = rows;
        let e = omega - self.bound;
        if !e.is_finite() {
            return rows;
        }
        let violation = if self.equality { e.abs() } else { e.max(0.) };
        let open = violation > LEAST * omega.abs().max(self.bound.abs());
        let (least, stalled) = match open {
            true if violation < FALL * least => (violation, 0.),
            true => (least, stalled + 1.),
            false => (NONE, 0.),
        };
        if e < -self.restart {
            return [0., 0., e, self.penalty, least, stalled];
        }
        let clip = |value: f64| value.min(self.cap).max(if self.equality { -self.cap } else { 0. });
        let average = if first { e } else { self.nu * average + (1. - self.nu) * e };
        let integral = clip(integral + if self.by_penalty { penalty } else { self.kappa_i } * e);
        let alpha = clip(self.kappa_p * average + integral);
        let grown =
            if violation > self.tolerance { (self.growth * penalty).min(self.limit) } else { penalty };
        [alpha, integral, average, grown, least, stalled]
    }

    fn on_device(&self, gpu: &Gpu, omegas: &Tensor, state: &Tensor, first: bool) -> Result<Tensor> {
        const NAME: &str = "group_dual";
        const THREADS: u32 = 256;
        let next = gpu.tensor(state.shape(), DType::F64)?;
        let [from, old, new] = [omegas, state, &next].map(|t| gpu.operand(t, NAME));
        let (from, old, new) = (from?, old?, new?);
        let args = DualArgs {
            omegas: from.address(),
            state: old.address(),
            next: new.address(),
            groups: omegas.elem_count() as u64,
            bound: self.bound,
            kappa_p: self.kappa_p,
            kappa_i: self.kappa_i,
            nu: self.nu,
            cap: self.cap,
            restart: self.restart,
            penalty: self.penalty,
            growth: self.growth,
            tolerance: self.tolerance,
            limit: self.limit,
            equality: u64::from(self.equality),
            by_penalty: u64::from(self.by_penalty),
            first: u64::from(first),
        };
        let grid = Grid::line(omegas.elem_count().div_ceil(THREADS as usize), THREADS)?;
        gpu.launch(Module::Group, NAME, grid, &args)?;
        Ok(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::emulate::emulate;
    use crate::ops::testing::{assert_close, random, values};
    use candle_core::Device;

    /// Worked by hand, group by group.
    #[test]
    fn a_step_by_hand() -> Result<()> {
        let step = DualStep {
            bound: 1.,
            kappa_p: 0.5,
            kappa_i: 0.1,
            nu: 0.75,
            cap: 6.,
            restart: 0.5,
            penalty: 2.,
            growth: 3.,
            tolerance: 0.25,
            limit: 10.,
            equality: false,
            by_penalty: false,
        };
        // alpha, integral, average, penalty, least, stalled.
        let old = [9., 4., 8., 4., 5., 7.];
        for (step, omega, expected) in [
            // e = 3: average 6.75, integral 4.3, 7.675 is beyond the cap; the penalty grows to its limit; 3 is less than 0.99 times 5.
            (step, 4., [6., 4.3, 6.75, 10., 3., 0.]),
            // e = 5: average 7.25, integral 4.5; no fall.
            (step, 6., [6., 4.5, 7.25, 10., 5., 8.]),
            // e = -0.4: not so far inside as to start anew: average 5.9, integral 3.96.
            (step, 0.6, [6., 3.96, 5.9, 4., NONE, 0.]),
            // e = -0.6: that far.
            (step, 0.4, [0., 0., -0.6, 2., NONE, 0.]),
            // e = 2e-4 is rounding.
            (step, 1.0002, [6., 4.00002, 6. + 0.25 * 2e-4, 4., NONE, 0.]),
            // Integral 4 + 4 * 0.2, and no more.
            (DualStep { by_penalty: true, kappa_p: 0., ..step }, 1.2, [4.8, 4.8, 6.05, 4., 0.2, 0.]),
            // An equality: e = -3, |e| = 3; integral 4 - 12 is beyond the cap.
            (
                DualStep { equality: true, by_penalty: true, restart: f64::INFINITY, ..step },
                -2.,
                [-6. + 0.5 * 5.25, -6., 5.25, 10., 3., 0.],
            ),
        ] {
            let run = || {
                let state = Tensor::new(&old, &Device::Cpu)?.reshape((6, 1))?;
                step.run(&Tensor::new(&[omega], &Device::Cpu)?, &state, false)
            };
            assert_close(&run()?, &expected, 1e-14);
            assert_close(&emulate(run)?, &expected, 1e-14);
        }
        Ok(())
    }

    #[test]
    fn on_the_device_as_on_the_host() -> Result<()> {
        for groups in [0, 1, 300] {
            let (state, omegas) = (random(0, &[6, groups])?, random(1, &[groups])?);
            for bits in 0..16 {
                let step = DualStep {
                    bound: 0.3,
                    kappa_p: 0.5,
                    kappa_i: 0.1,
                    nu: 0.75,
                    cap: if bits & 1 > 0 { 0.7 } else { f64::INFINITY },
                    restart: if bits & 2 > 0 { 0.2 } else { f64::INFINITY },
                    penalty: 2.,
                    growth: 1.5,
                    tolerance: 0.25,
                    limit: 1.,
                    equality: bits & 4 > 0,
                    by_penalty: bits & 8 > 0,
                };
                for first in [true, false] {
                    let run = || step.run(&omegas, &state, first);
                    let (found, expected) = (emulate(run)?, run()?);
                    assert_eq!(found.dims(), [6, groups]);
                    assert_close(&found, &values(&expected)?, 1e-14);
                }
            }
        }
        // What has no place in a multiplier leaves it as it was.
        if emulate(|| Gpu::emulated().is_some()) {
            let step = DualStep {
                bound: 1.,
                kappa_p: 1.,
                kappa_i: 1.,
                nu: 0.,
                cap: f64::INFINITY,
                restart: f64::INFINITY,
                penalty: 0.,
                growth: 1.,
                tolerance: 0.,
                limit: 0.,
                equality: false,
                by_penalty: false,
            };
            let state = random(0, &[6, 3])?;
            let omegas = Tensor::new(&[f64::NAN, f64::INFINITY, 1.], &Device::Cpu)?;
            let next = emulate(|| step.run(&omegas, &state, false))?;
            assert_close(&next.narrow(1, 0, 2)?, &values(&state.narrow(1, 0, 2)?)?, 0.);
        }
        Ok(())
    }
}
