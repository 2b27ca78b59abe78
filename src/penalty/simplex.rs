//! The threshold by which points are moved onto a simplex or an L1 ball.

/// The `t` for which `sum_i [t - d_i]_+ = total`, where `d_i >= 0` are distances below the largest value (so that one is zero) and
/// `total > 0`. `d` is reordered. Expected time is linear (Duchi et al. 2008, figure 2): the half of `d` that cannot decide is
/// dropped in each round.
///
/// The usual threshold on the values themselves is the largest value less `t`; kept apart, a small `total` beside large values
/// is not lost to rounding.
pub(crate) fn height(d: &mut [f64], total: f64) -> f64 {
    let (mut sum, mut count) = (0.0, 0);
    let mut rest = d;
    while !rest.is_empty() {
        let middle = rest.len() / 2;
        let (_, &mut pivot, _) = rest.select_nth_unstable_by(middle, f64::total_cmp);
        let sum_to = sum + rest[..=middle].iter().sum::<f64>();
        let count_to = count + middle + 1;
        // The mass under the pivot's level: if it does not fill `total`, the level is higher and all up to here belong.
        if pivot * (count_to as f64) - sum_to < total {
            (sum, count) = (sum_to, count_to);
            rest = &mut rest[middle + 1..];
        } else {
            rest = &mut rest[..middle];
        }
    }
    (total + sum) / count.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_mass_below_the_level_is_the_total(
            mut d in prop::collection::vec(0.0..10f64, 0..40),
            exponent in -20..20i32,
            ties in 0..3usize,
        ) {
            d.extend(vec![0.0; ties + 1]);
            let total = 10f64.powi(exponent);
            let t = height(&mut d, total);
            let mass: f64 = d.iter().map(|d| (t - d).max(0.0)).sum();
            prop_assert!((mass - total).abs() <= 1e-13 * total, "{mass} {total}");
        }
    }
}
