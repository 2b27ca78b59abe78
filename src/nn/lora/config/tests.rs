use super::*;

#[test]
fn keys_are_ends_of_names() {
    let is = |key: &str, name: &str| Key::parse(key).is_some_and(|key| key.matches(name));
    assert!(is("fc1", "fc1") && is("fc1", "a.fc1") && !is("fc1", "afc1") && !is("fc1", "fc1.b"));
    assert!(
        is("a.fc1", "b.a.fc1") && is("a.fc1", "a_fc1") && !is(r"a\.fc1", "a_fc1") && is(r"a\.fc1", "a.fc1")
    );
    assert!(is("^fc1", "fc1") && !is("^fc1", "a.fc1"));
    for key in ["a|b", "a*", "(a)", "a+", "[ab]", "a$", r"\d", r"a\"] {
        assert!(Key::parse(key).is_none(), "{key}");
    }
    assert_eq!(escaped("a.b_c-1"), r"a\.b_c\-1");
}

#[test]
fn what_changes_the_values_and_is_not_supported_is_named() {
    let parse = |more: &str| {
        Config::parse("file", &format!("{{\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 4 {more}}}"))
    };
    assert!(parse("").is_ok());
    for fine in [
        r#""use_dora": false, "modules_to_save": null, "layer_replication": null, "loftq_config": {}"#,
        r#""lora_dropout": 0.1, "task_type": "CAUSAL_LM", "inference_mode": true, "target_modules": "all-linear""#,
        r#""init_lora_weights": "gaussian", "layers_to_transform": [0, 1], "a_new_thing": false"#,
    ] {
        assert!(parse(&format!(", {fine}")).is_ok(), "{fine}");
    }
    for (key, wrong) in [
        ("use_dora", "true"),
        ("bias", r#""all""#),
        ("modules_to_save", r#"["head"]"#),
        ("lora_bias", "true"),
        ("layer_replication", "[[0, 1]]"),
        ("trainable_token_indices", "[1]"),
        ("target_parameters", r#"["w"]"#),
        ("init_lora_weights", r#""pissa""#),
        ("loftq_config", r#"{"bits": 4}"#),
        ("a_new_thing", "3"),
        ("use_rslora", "1"),
        ("target_modules", "3"),
        ("rank_pattern", r#"{"a|b": 2}"#),
        ("rank_pattern", r#"{"a": 0}"#),
        ("alpha_pattern", r#"{"a": "b"}"#),
    ] {
        let message = parse(&format!(", {key:?}: {wrong}")).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(message.starts_with("file: ") && message.contains(key), "{key}: {message}");
    }
    for text in [
        "",
        "{}",
        r#"{"r": 2}"#,
        r#"{"r": 0, "lora_alpha": 1}"#,
        r#"{"peft_type": "IA3", "r": 1, "lora_alpha": 1}"#,
    ] {
        assert!(Config::parse("file", text).is_err(), "{text}");
    }
}

#[test]
fn strengths() -> Result<()> {
    let text = r#"{"r": 4, "lora_alpha": 8, "use_rslora": true, "rank_pattern": {"fc1": 9}, "alpha_pattern": {"^a.fc1": 3, "fc1": 6}}"#;
    let config = Config::parse("file", text)?;
    assert_eq!((config.scale_of("fc2")?, config.scale_of("b.fc1")?), (4., 2.));
    let message = config.scale_of("a.fc1").err().map(|e| e.to_string()).unwrap_or_default();
    assert!(message.contains("a.fc1 matches"), "{message}");
    let text = r#"{"r": 4, "lora_alpha": 8, "target_modules": ["fc1", "q"], "exclude_modules": ["a.q"]}"#;
    let config = Config::parse("file", text)?;
    assert_eq!(config.scale_of("fc1")?, 2.);
    assert!(config.targets("b.q") && config.targets("q") && !config.targets("a.q") && !config.targets("bq"));
    Ok(())
}
