//! The state of a model's constraints as a file: multipliers, their integrals and averages.

use super::{Constraints, Multiplier};
use crate::checkpoint::Checkpoint;
use candle_core::{Device, Result, Tensor, bail};
use std::path::Path;

/// The metadata entry with what the multipliers are of, a line `name = omega` each.
const KEY: &str = "kronwake constraints";

impl Constraints {
    /// Writes the multipliers' state as safetensors, `[groups]` in f64 each: named `{Var}.{index}.alpha`, `.integral`, (after a first step)
    /// `.average`, `.penalty`, the factor of the quadratic term, and `.least` and `.stalled`, of which the report says whether constraints look
    /// infeasible. `index` counts the Var's multipliers; those of a [`Rule::LagrangianTotal`](super::Rule::LagrangianTotal) are named
    /// `{pattern} together.{index}`. Penalties and projections have no state, and the Vars are not in it.
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use kronwake::nn::{VarBuilder, VarMap};
    /// use kronwake::penalty::{Bound, Constraints, Dual, Grouping, Omega, Rule};
    ///
    /// # let varmap = VarMap::new();
    /// # VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu).get(2, "w")?;
    /// # let file = std::env::temp_dir().join(format!("kronwake-doc-constraints-{}", std::process::id()));
    /// let (omega, bound) = (Omega::Norm(Grouping::Rows), Bound::AtMost(1.0));
    /// let rule = Rule::Lagrangian { omega, bound, dual: Dual::ascent(0.1) };
    /// let mut constraints = Constraints::new(&varmap, &[("w", rule)])?;
    /// constraints.after_step(0.1)?;
    /// constraints.save(&file)?;
    /// constraints.resume(&file)?;
    /// # std::fs::remove_file(&file)?;
    /// # candle_core::Result::Ok(())
    /// ```
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let mut file = Checkpoint::default();
        let mut lines = String::new();
        for (name, multiplier) in self.multipliers() {
            lines.push_str(&format!("{name} = {}\n", multiplier.kind()));
            for (slot, values) in multiplier.state()? {
                file.tensors.insert(format!("{name}.{slot}"), values);
            }
        }
        file.metadata.insert(KEY.into(), lines);
        file.write(path)
    }

    /// Goes on from what [`Constraints::save`] wrote for constraints of the same functions and bounds on Vars of the same names and shapes: the
    /// steps that follow are those that would have followed there. How the multipliers follow ([`Dual`](super::super::Dual)) may differ. Files of
    /// versions that wrote multipliers, integrals and averages alone are read: penalties start at the first one, and stalls are counted from
    /// here.
    ///
    /// # Errors
    /// When the file cannot be read or is another's; the message names the multiplier, and nothing has changed.
    pub fn resume(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let mut file = Checkpoint::read(path, &Device::Cpu)?;
        let Some(lines) = file.metadata.get(KEY) else {
            bail!("{}: not a file of constraints: no metadata entry {KEY:?}", path.display())
        };
        let kinds: Vec<_> = lines.lines().filter_map(|line| line.split_once(" = ")).collect();
        let mut resumed = vec![];
        for (name, multiplier) in self.multipliers() {
            let expected = multiplier.kind();
            match kinds.iter().find(|(other, _)| *other == name) {
                Some((_, kind)) if *kind == expected => {}
                Some((_, kind)) => {
                    bail!("{}: {name} is of {kind}, expected {expected}", path.display())
                }
                None => bail!("{}: {name} is missing", path.display()),
            }
            let groups = multiplier.count();
            let read = |slot: &'static str| -> Result<Option<Tensor>> {
                let key = format!("{name}.{slot}");
                let Some(values) = file.tensors.remove(&key) else { return Ok(None) };
                if values.dims() != [groups] {
                    bail!("{key} is {:?}, expected [{groups}]", values.dims())
                }
                match values.to_vec1::<f64>() {
                    Ok(numbers) if numbers.iter().all(|v| v.is_finite()) => Ok(Some(values)),
                    Ok(_) | Err(_) => bail!("{key}: expected finite numbers in f64"),
                }
            };
            match multiplier.resumed(&name, read) {
                Ok(multiplier) => resumed.push(multiplier),
                Err(error) => bail!("{}: {error}", path.display()),
            }
        }
        if let Some((name, _)) = kinds.iter().find(|(name, _)| !self.multipliers().any(|(n, _)| n == *name)) {
            bail!("{}: {name} has no place here", path.display())
        }
        let own = self.entries.iter_mut().flat_map(|entry| &mut entry.multipliers);
        let totals = self.lagrangian_totals.iter_mut().map(|total| &mut total.multiplier);
        own.chain(totals).zip(resumed).for_each(|(old, new)| *old = new);
        Ok(())
    }

    /// All multipliers by the Var's name and their index there, and those of several Vars by pattern and index among their kind.
    fn multipliers(&self) -> impl Iterator<Item = (String, &Multiplier)> {
        let own = self.entries.iter().flat_map(|entry| {
            let each = entry.multipliers.iter().enumerate();
            each.map(|(index, multiplier)| (format!("{}.{index}", entry.name), multiplier))
        });
        let totals = self
            .lagrangian_totals
            .iter()
            .enumerate()
            .map(|(index, total)| (format!("{} together.{index}", total.pattern), &total.multiplier));
        own.chain(totals)
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::{AugmentedLagrangian, Bound, Dual, Grouping, Omega, Rule};
    use super::*;
    use candle_core::Var;
    use candle_nn::VarMap;

    struct Setup {
        varmap: VarMap,
        constraints: Constraints,
    }

    fn setup(rows: usize, bound: f64, names: &[&str]) -> Result<Setup> {
        let varmap = VarMap::new();
        for name in names {
            let start: Vec<f64> = (0..3 * rows).map(|i| 0.1 * i as f64).collect();
            let var = Var::from_vec(start, (rows, 3), &Device::Cpu)?;
            varmap.data().lock().unwrap().insert((*name).into(), var);
        }
        let lagrangian = |omega, dual| Rule::Lagrangian { omega, bound: bound.into(), dual };
        let rules = [
            ("*", lagrangian(Omega::Norm(Grouping::Rows), Dual::nu_pi(0.5, 0.1, 0.9))),
            ("*", lagrangian(Omega::L1(Grouping::Columns), Dual { cap: Some(0.3), ..Dual::ascent(0.05) })),
            (
                "*",
                Rule::LagrangianTotal {
                    omega: Omega::SquaredNorm(Grouping::Whole),
                    bound: Bound::Equal(2.),
                    dual: Dual::augmented_lagrangian(AugmentedLagrangian {
                        penalty: 0.1,
                        growth: 1.01,
                        ..Default::default()
                    }),
                },
            ),
        ];
        let constraints = Constraints::new(&varmap, &rules)?;
        Ok(Setup { varmap, constraints })
    }

    impl Setup {
        fn step(&mut self, steps: usize) -> Result<()> {
            for _ in 0..steps {
                let vars = self.varmap.all_vars();
                let mut loss = self.constraints.loss()?;
                for var in &vars {
                    loss = (loss + ((var.as_tensor() - 1.5)?.sqr()?.sum_all()? * 0.5)?)?;
                }
                let grads = loss.backward()?;
                for var in &vars {
                    var.set(&(var.as_detached_tensor() - (grads.get(var).unwrap() * 0.05)?)?)?;
                }
                self.constraints.after_step(0.05)?;
            }
            Ok(())
        }

        fn bits(&self) -> Result<Vec<u64>> {
            let mut all = vec![];
            for (_, var) in self.varmap.data().lock().unwrap().iter() {
                all.extend(var.flatten_all()?.to_vec1::<f64>()?);
            }
            for (_, report) in self.constraints.report()? {
                all.extend(report.alpha.into_iter().chain(report.penalty));
                all.extend(report.stalled.into_iter().map(|steps| steps as f64));
            }
            let mut bits: Vec<_> = all.into_iter().map(f64::to_bits).collect();
            bits.sort_unstable();
            Ok(bits)
        }
    }

    #[test]
    fn resumed_multipliers_are_the_uninterrupted_ones() -> Result<()> {
        let path = std::env::temp_dir().join(format!("kronwake-constraints-{}", std::process::id()));
        for before in [0, 50] {
            let (mut whole, mut resumed) = (setup(4, 1., &["a", "b"])?, setup(4, 1., &["a", "b"])?);
            whole.step(before)?;
            whole.constraints.save(&path)?;
            for (name, var) in whole.varmap.data().lock().unwrap().iter() {
                resumed.varmap.data().lock().unwrap()[name].set(var)?;
            }
            resumed.constraints.resume(&path)?;
            whole.step(50)?;
            resumed.step(50)?;
            assert_eq!(whole.bits()?, resumed.bits()?);
            let reports = whole.constraints.report()?;
            assert!(reports.iter().any(|(_, report)| report.alpha.iter().any(|a| *a > 0.)));
            let (name, together) = &reports[4];
            assert!(*name == "*" && together.penalty[0] > 0.1 && together.penalty[0] < 1e4, "{together:?}");
            assert!(reports.iter().any(|(_, report)| report.stalled.iter().any(|steps| *steps > 0)));
        }
        let mut empty = setup(0, 1., &["a"])?.constraints;
        empty.after_step(0.1)?;
        empty.save(&path)?;
        empty.resume(&path)?;
        setup(4, 1., &["a", "b"])?.constraints.save(&path)?;
        let file = path.display();
        for (rows, bound, names, message) in [
            (4, 2., &["a", "b"][..], "a.0 is of Norm(Rows) <= 1, expected Norm(Rows) <= 2"),
            (5, 1., &["a", "b"], "a.0.alpha is [4], expected [5]"),
            (4, 1., &["a", "b", "c"], "c.0 is missing"),
            (4, 1., &["b"], "a.0 has no place here"),
        ] {
            let mut other = setup(rows, bound, names)?;
            other.step(3)?;
            let before = other.bits()?;
            let error = other.constraints.resume(&path).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{file}: {message}")), "{error}");
            assert_eq!(other.bits()?, before);
        }
        // What older versions wrote: no penalties, and no stalls.
        let (mut whole, mut resumed) = (setup(4, 1., &["a", "b"])?, setup(4, 1., &["a", "b"])?);
        whole.step(50)?;
        whole.constraints.save(&path)?;
        let mut old = Checkpoint::read(&path, &Device::Cpu)?;
        let kept = ["alpha", "integral", "average"];
        old.tensors.retain(|name, _| kept.iter().any(|slot| name.ends_with(slot)));
        old.write(&path)?;
        resumed.constraints.resume(&path)?;
        let alphas = |setup: &Setup| -> Result<Vec<Vec<f64>>> {
            Ok(setup.constraints.report()?.into_iter().map(|(_, report)| report.alpha).collect())
        };
        assert_eq!(alphas(&whole)?, alphas(&resumed)?);
        let reports = resumed.constraints.report()?;
        assert!(reports.iter().all(|(_, report)| report.stalled.iter().all(|steps| *steps == 0)));
        assert_eq!(reports[4].1.penalty, [0.1]);
        old.tensors.remove("b.1.integral");
        old.write(&path)?;
        let error = resumed.constraints.resume(&path).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{file}: b.1.integral is missing")), "{error}");
        Checkpoint::default().write(&path)?;
        let error = setup(4, 1., &["a"])?.constraints.resume(&path).unwrap_err().to_string();
        assert!(error.contains("not a file of constraints"), "{error}");
        std::fs::remove_file(&path)?;
        Ok(())
    }
}
