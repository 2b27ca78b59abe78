//! The example `tune` from end to end, as a user starts it, against values of an independent implementation.

use crate::folder::Folder;
use candle_core::{DType, Device, Result, Tensor};
use kronwake::checkpoint::Checkpoint;
use serde_json::Value;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/marglik");

fn run(folder: &Folder, line: &str) -> Result<Value> {
    let output = folder.command_of("tune", &format!("{line} --json out.json")).output()?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{line}\n{out}\n{err}");
    Ok(serde_json::from_slice(&folder.read("out.json")).expect("json"))
}

fn number(value: &Value) -> f64 {
    value.as_f64().expect("a number")
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("a list").iter().map(number).collect()
}

/// The golden net under the names of the model, and its examples; the golden order of tensors is weight before bias.
fn write_golden(folder: &Folder) -> Result<Value> {
    let golden = Checkpoint::read(format!("{GOLDEN}/mlp.safetensors"), &Device::Cpu)?;
    let mut net = Checkpoint::default();
    for (from, to) in [("0", "fc1"), ("1", "fc2"), ("2", "fc3")] {
        for kind in ["weight", "bias"] {
            net.tensors.insert(format!("{to}.{kind}"), golden.tensors[&format!("f64.{from}.{kind}")].clone());
        }
    }
    net.write(folder.0.join("net.safetensors"))?;
    let mut examples = Checkpoint::default();
    for (from, to) in [("x_u8", "x"), ("label", "y")] {
        examples.tensors.insert(to.into(), golden.tensors[from].clone());
    }
    examples.write(folder.0.join("examples.safetensors"))?;
    Ok(serde_json::from_slice(&std::fs::read(format!("{GOLDEN}/mlp.json"))?).expect("json"))
}

/// From weight before bias to the order of the names, and back.
fn swapped(list: &[f64]) -> Vec<f64> {
    list.chunks(2).flat_map(|pair| [pair[1], pair[0]]).collect()
}

const NET: &str =
    "--checkpoint net.safetensors --model mlp:784-32-16-10:tanh --examples examples.safetensors";

#[test]
fn evaluations_agree_with_another_implementation() -> Result<()> {
    let folder = Folder::new("tune-golden");
    let golden = write_golden(&folder)?;
    for (setting, bound, quantity) in [
        ("s1_layerwise", "ntk --batch 64", "ntk_b64"),
        ("s3_strong_T0.5", "ntk --batch 256 --grouped", "ntk_grouped_by_label"),
        ("s1_layerwise", "indep --batch 256", "indep_factored"),
        ("s3_strong_T0.5", "indep --batch 256 --split diagonal", "indep"),
        ("s1_layerwise", "kfac", "kfac"),
        ("s3_strong_T0.5", "block", "ggn_blockdiag_tensor"),
        ("s1_layerwise", "block-layer", "ggn_blockdiag_layer"),
        ("s1_layerwise", "diag", "ggn_diag"),
        ("s1_layerwise", "full", "ntk_full"),
    ] {
        let setting = &golden["settings"][setting];
        let expected = &setting["quantities"][quantity];
        let precisions: Vec<String> =
            swapped(&numbers(&setting["prec"])).iter().map(|p| format!("{p:e}")).collect();
        let line = format!(
            "{NET} --dtype f64 --steps 0 --bound {bound} --prior-precision {} --temperature {}",
            precisions.join(","),
            setting["temperature"]
        );
        let found = run(&folder, &line)?;
        let near = |found: f64, expected: f64| {
            assert!(
                (found - expected).abs() < 1e-9 * expected.abs().max(1.0),
                "{bound}: {found}, expected {expected}"
            );
        };
        for (ours, theirs) in [
            ("log_likelihood", "loglik"),
            ("log_prior", "prior_term"),
            ("log_det", "logdet"),
            ("log_evidence", "log_marglik"),
            ("grad_log_temperature", "grad_log_temp"),
        ] {
            near(number(&found[ours]), number(&expected[theirs]));
        }
        for (found, expected) in numbers(&found["grad_log_precision"])
            .into_iter()
            .zip(swapped(&numbers(&expected["grad_log_prec"])))
        {
            near(found, expected);
        }
        assert_eq!(found["tensors"][0], "fc1.bias");
    }
    Ok(())
}

#[test]
fn tuning_raises_the_evidence() -> Result<()> {
    let folder = Folder::new("tune-climb");
    write_golden(&folder)?;
    let found =
        run(&folder, &format!("{NET} --bound extrapolated --batch 64 --steps 30 --tune-temperature"))?;
    assert!(number(&found["log_evidence"]) > number(&found["before"]["log_evidence"]) + 100.0);
    assert_ne!(number(&found["temperature"]), 1.0);
    assert!(folder.read("evidence.svg").starts_with(b"<svg"));
    Ok(())
}

#[test]
fn a_regression_with_its_noise() -> Result<()> {
    let folder = Folder::new("tune-regression");
    let golden = Checkpoint::read(format!("{GOLDEN}/regression.safetensors"), &Device::Cpu)?;
    let mut net = Checkpoint::default();
    for (from, to) in [("0", "fc1"), ("1", "fc2"), ("2", "fc3")] {
        for kind in ["weight", "bias"] {
            net.tensors.insert(format!("{to}.{kind}"), golden.tensors[&format!("f32.{from}.{kind}")].clone());
        }
    }
    net.write(folder.0.join("net.safetensors"))?;
    let mut examples = Checkpoint::default();
    for (from, to) in [("X", "x"), ("Y", "y")] {
        examples.tensors.insert(to.into(), golden.tensors[from].to_dtype(DType::F32)?);
    }
    examples.write(folder.0.join("examples.safetensors"))?;
    let line = "--checkpoint net.safetensors --model mlp:3-20-12-2:tanh --examples examples.safetensors --bound full --steps 200";
    let found = run(&folder, line)?;
    // Where the derivative by the noise is zero, noise^2 (N C - effective parameters) is the sum of squared errors: N C = 192, of a
    // mean square of 0.020006 (golden).
    let noise = number(&found["noise"]);
    let effective: f64 = numbers(&found["effective_parameters"]).iter().sum();
    let expected = (192.0 * 0.020006458 / (192.0 - effective)).sqrt();
    assert!((noise / expected - 1.0).abs() < 0.02, "{noise}, expected {expected}");
    Ok(())
}

#[test]
fn errors_are_one_sentence_and_nothing_is_written() -> Result<()> {
    let folder = Folder::new("tune-errors");
    write_golden(&folder)?;
    let net = Checkpoint::read(folder.0.join("net.safetensors"), &Device::Cpu)?;
    let with = |file: &str, name: &str, tensor: Option<Tensor>| {
        let mut changed = net.clone();
        match tensor {
            Some(tensor) => changed.tensors.insert(name.into(), tensor),
            None => changed.tensors.remove(name),
        };
        changed.write(folder.0.join(file))
    };
    with("missing", "fc2.bias", None)?;
    with("extra", "fc4.bias", Some(Tensor::zeros(3, DType::F32, &Device::Cpu)?))?;
    with("nan", "fc2.bias", Some((Tensor::ones(16, DType::F64, &Device::Cpu)? * f64::NAN)?))?;
    std::fs::write(folder.0.join("junk"), "no safetensors")?;
    let mut wrong = Checkpoint::read(folder.0.join("examples.safetensors"), &Device::Cpu)?;
    let labels = wrong.tensors["y"].clone();
    wrong.tensors.insert("y".into(), (&labels + 3.0)?);
    wrong.write(folder.0.join("labels"))?;
    wrong.tensors.remove("y");
    wrong.write(folder.0.join("no-labels"))?;
    let model = "--model mlp:784-32-16-10:tanh";
    for (line, code, part) in [
        (format!("--checkpoint missing {model}"), 1, "missing fc2.bias [16]"),
        (format!("--checkpoint extra {model}"), 1, "unexpected fc4.bias"),
        (format!("--checkpoint nan {model}"), 1, "fc2.bias holds NaN"),
        (format!("--checkpoint junk {model}"), 1, "junk: not a whole safetensors file"),
        (
            "--checkpoint net.safetensors --model mlp:784-32-17-10".into(),
            1,
            "fc2.weight has shape [16, 32], expected [17, 32]",
        ),
        (
            format!("--checkpoint net.safetensors {model} --examples labels"),
            1,
            "is out of range for 10 classes",
        ),
        (
            format!("--checkpoint net.safetensors {model} --examples no-labels"),
            1,
            "expected tensors x [n, ..] and y [n]",
        ),
        (format!("{NET} --batch 257"), 1, "--batch 257 is more than the 256 examples"),
        (format!("{NET} --prior-precision 0"), 2, "expected a number above 0"),
        (format!("{NET} --prior-precision 1,2"), 1, "--prior-precision: 2 numbers, expected 1 or 6"),
        (format!("{NET} --likelihood gaussian"), 1, "expected targets of shape"),
        (format!("{NET} --bound ntk --output 3"), 1, "--output applies to --bound single alone"),
        (format!("{NET} --bound single --output 10"), 1, "output 10 of 10"),
        (format!("{NET} --bound full --memory 0.001"), 1, "would take"),
        (format!("{NET} --prior-precision 1e-12"), 1, "condition number"),
        ("--model mlp:784-10:gelu".into(), 2, "expected mlp:N-..-N"),
    ] {
        let output = folder.command_of("tune", &format!("{line} --steps 0 --json out.json")).output()?;
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{line}: {error}");
        assert!(error.contains(part), "{line}: {error}");
        if code == 1 {
            assert_eq!(error.lines().count(), 1, "{line}: {error}");
        }
        assert!(!folder.0.join("out.json").exists(), "{line}");
    }
    Ok(())
}

/// The blocks of a part and of the rest make up those of all; the rotated diagonal lies between the blocks and the diagonal.
#[test]
fn parts_and_the_rotated_bound() -> Result<()> {
    let folder = Folder::new("tune-parts");
    write_golden(&folder)?;
    let evaluate = |rest: &str| run(&folder, &format!("{NET} --dtype f64 --steps 0 {rest}"));
    let log_det = |rest: &str| -> Result<f64> { Ok(number(&evaluate(rest)?["log_det"])) };
    let last = evaluate("--bound block --part fc3.*")?;
    assert_eq!(last["tensors"], serde_json::json!(["fc3.bias", "fc3.weight"]));
    assert_eq!(numbers(&last["prior_precision"]).len(), 2);
    let all = log_det("--bound block")?;
    let parts = number(&last["log_det"]) + log_det("--bound block --part !fc3.*")?;
    assert!((all - parts).abs() < 1e-9 * all, "{all}, in parts {parts}");
    let (rotated, diagonal) = (log_det("--bound rotated")?, log_det("--bound diag")?);
    assert!(all < rotated && rotated < diagonal, "{all} {rotated} {diagonal}");
    Ok(())
}
