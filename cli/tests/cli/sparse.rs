//! The example `sparse` from end to end, as a user starts it.

use crate::folder::Folder;
use candle_core::{DType, Device, Result};
use kronwake::checkpoint::Checkpoint;
use kronwake::prune::read_sparse;

fn nonzeros(file: &Checkpoint) -> Result<f64> {
    let count = |t: &candle_core::Tensor| t.ne(0f32)?.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>();
    file.tensors.values().map(count).sum()
}

#[test]
fn the_files_are_the_net_that_is_printed() -> Result<()> {
    let folder = Folder::new("sparse-files");
    let output = folder
        .command_of("sparse", "--epochs 2 --tune-epochs 0 --keep 20000 --loss 0.9 --seed 3")
        .output()?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}\n{err}");
    let path = |name: &str| folder.0.join(format!("{name}.safetensors"));
    let dense = Checkpoint::read(path("dense"), &Device::Cpu)?;
    let compact = Checkpoint::read(path("compact"), &Device::Cpu)?;
    let sparse = read_sparse(path("sparse"), &Device::Cpu)?;
    assert_eq!(dense.tensors["fc1.weight"].dims(), [300, 784]);
    assert_eq!(nonzeros(&sparse)?, nonzeros(&compact)?);
    // The smallest net, weights and biases, is in the table.
    let count = nonzeros(&compact)?;
    assert!(
        (20_000.0..21_000.0).contains(&count) && out.contains(&format!("{count:8}   ")),
        "{count}\n{out}"
    );
    let inputs = compact.metadata["inputs"].split(' ').count();
    assert_eq!(compact.tensors["fc1.weight"].dim(1)?, inputs);
    assert!(out.contains(&format!("{inputs} of 784 pixels are read")), "{out}");
    Ok(())
}

#[test]
fn errors_are_one_sentence() {
    let folder = Folder::new("sparse-errors");
    std::fs::write(folder.0.join("junk"), "no json").unwrap();
    for (line, code, part) in [
        ("--factor -1", 2, "--factor"),
        ("--part 1/2", 2, "--study"),
        ("--study none --penalty l1", 2, "--penalty"),
        ("--study junk --part 3/2", 2, "expected K/N with K from 1 to N"),
        ("--data-dir nowhere", 1, "nowhere: neither train-images-idx3-ubyte"),
        ("--out junk/there", 1, "--out junk/there: cannot be made"),
        ("--study junk", 1, "junk, line 1: "),
        ("--study none --stage final", 1, "--stage final: the tune stage has no result of none 0 yet"),
        ("--lr 1e30 --epochs 1", 1, "the loss is not finite in epoch 1; lower the rate or --factor"),
    ] {
        let output = folder.command_of("sparse", line).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{line}: {error}");
        assert!(error.contains(part) && error.starts_with("error: "), "{line}: {error}");
        assert!(code == 2 || error.trim_end().lines().count() == 1, "{line}: {error}");
    }
}
