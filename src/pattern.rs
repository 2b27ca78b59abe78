//! Patterns of Vars' names, shared by the optimizers' groups and the constraints.

/// Whether `name` matches `pattern`, in which `*` stands for any run of characters and `?` for any one; by the usual scan that
/// returns to the last `*`.
pub(crate) fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        if p < pattern.len() && pattern[p] == b'*' {
            star = Some((p, n));
            p += 1;
        } else if p < pattern.len() && (pattern[p] == b'?' || pattern[p] == name[n]) {
            p += 1;
            n += 1;
        } else if let Some((at, from)) = star {
            star = Some((at, from + 1));
            p = at + 1;
            n = from + 1;
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        for (pattern, name, expected) in [
            ("*", "", true),
            ("fc1.weight", "fc1.weight", true),
            ("fc?.weight", "fc1.weight", true),
            ("fc?.weight", "fc12.weight", false),
            ("*.bias", "encoder.0.bias", true),
            ("enc*.b*s", "encoder.0.bias", true),
            ("enc*.b*s", "encoder.0.biases.x", false),
            ("a*b*c", "aXbXbXc", true),
            ("", "x", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }
}
