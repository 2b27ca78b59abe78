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
    in_words(text.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// What the CUDA driver has only a name for, and a user can do something about.
const DRIVER: [(&str, &str); 2] = [
    (
        "DriverError(CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
        "the GPU's driver is older than the CUDA that the kernels were compiled with; update it, or build with a CUDA that it knows",
    ),
    (
        "DriverError(CUDA_ERROR_OUT_OF_MEMORY",
        "the GPU has too little free memory; a smaller --batch takes less",
    ),
];

fn in_words(text: String) -> String {
    for (name, words) in DRIVER {
        if let Some(start) = text.find(name)
            && let Some(end) = text[start..].find("\")")
        {
            return format!("{}{words}{}", &text[..start], &text[start + end + 2..]);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_driver_is_put_in_words() {
        let driver =
            |name: &str| Error::msg(format!("DriverError(CUDA_ERROR_{name}, \"as NVIDIA says\")")).bt();
        assert_eq!(
            sentence(&driver("OUT_OF_MEMORY").context("kernel wake_f32")),
            "kernel wake_f32: the GPU has too little free memory; a smaller --batch takes less"
        );
        assert!(sentence(&driver("UNSUPPORTED_PTX_VERSION")).starts_with("the GPU's driver is older than"));
        assert_eq!(
            sentence(&driver("LAUNCH_FAILED")),
            "DriverError(CUDA_ERROR_LAUNCH_FAILED, \"as NVIDIA says\")"
        );
    }

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
