//! Errors as single sentences.

use candle_core::Error;

/// The message on one line, without the backtraces that candle adds where `RUST_BACKTRACE` is set.
pub fn sentence(error: &Error) -> String {
    let text = match error {
        Error::WithBacktrace { inner, .. } => sentence(inner),
        Error::WithPath { inner, path } => format!("{}: {}", path.display(), sentence(inner)),
        Error::Context { inner, context } => format!("{context}: {}", sentence(inner)),
        other => other.to_string(),
    };
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backtraces_and_line_breaks_are_left_out() {
        let inner = Error::msg("no such\n  tensor").bt().bt();
        assert_eq!(sentence(&inner), "no such tensor");
        assert_eq!(
            sentence(&inner.context("while reading").with_path("a/b").bt()),
            "a/b: while reading: no such tensor"
        );
    }
}
