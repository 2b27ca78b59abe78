//! candle-transformers' own model files on `kronwake::nn` (scripts/drop-in.sh). It builds them, which takes minutes: left out unless
//! `KRONWAKE_DROP_IN=1`.

use std::process::Command;

#[test]
fn model_files_train_by_one_line() {
    if std::env::var("KRONWAKE_DROP_IN").as_deref() != Ok("1") {
        eprintln!("left out: KRONWAKE_DROP_IN is not 1");
        return;
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/drop-in.sh");
    let done = Command::new("bash").arg(script).output().unwrap();
    let (found, problems) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{found}{problems}");
    assert!(!found.contains("does not compile"), "{found}");
}
