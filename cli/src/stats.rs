//! Means, deviations and medians of small samples, and tables of them in markdown.

/// The mean; NaN of nothing.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The standard deviation with `n - 1`; NaN below two values.
pub fn deviation(values: &[f64]) -> f64 {
    let mean = mean(values);
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    (squares / (values.len() as f64 - 1.0)).sqrt()
}

/// The standard error of the mean; NaN below two values.
pub fn standard_error(values: &[f64]) -> f64 {
    deviation(values) / (values.len() as f64).sqrt()
}

/// The middle value, or the mean of the middle two; NaN of nothing.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match (sorted.len(), sorted.len() % 2) {
        (0, _) => f64::NAN,
        (_, 1) => sorted[middle],
        _ => 0.5 * (sorted[middle - 1] + sorted[middle]),
    }
}

/// With some digits after the point; a dash for what is no finite number.
pub fn cell(value: f64, digits: usize) -> String {
    if value.is_finite() { format!("{value:.digits$}") } else { "-".into() }
}

/// Mean and, of two or more, standard deviation.
pub fn spread(values: &[f64], digits: usize) -> String {
    match values.len() {
        0 | 1 => cell(mean(values), digits),
        _ => format!("{} ± {}", cell(mean(values), digits), cell(deviation(values), digits)),
    }
}

/// A table's first two lines.
pub fn header(text: &mut String, titles: &[impl ToString]) {
    row(text, titles);
    row(text, &vec!["---"; titles.len()]);
}

/// A further line.
pub fn row(text: &mut String, cells: &[impl ToString]) {
    let cells: Vec<String> = cells.iter().map(ToString::to_string).collect();
    text.push_str(&format!("| {} |\n", cells.join(" | ")));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_samples() {
        let values = [4.0, 1.0, 3.0, 2.0];
        assert_eq!((mean(&values), median(&values), median(&values[..3])), (2.5, 2.5, 3.0));
        assert!((deviation(&values) - (5.0f64 / 3.0).sqrt()).abs() < 1e-15);
        assert!((standard_error(&values) - (5.0f64 / 12.0).sqrt()).abs() < 1e-15);
        assert_eq!(median(&[1.0, f64::INFINITY, f64::INFINITY]), f64::INFINITY);
        assert!(median(&[]).is_nan() && deviation(&[1.0]).is_nan());
    }
}
