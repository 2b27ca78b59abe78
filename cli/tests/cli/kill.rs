//! A training that is killed again and again ends where an uninterrupted one does.

use crate::folder::Folder;
use std::path::Path;
use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, SystemTime};

const TRAINING: &str = "--optimizer so --model mlp:784-32-10 --epochs 8 --batch 64 --threads 1 --seed 3";
const KILLS: u64 = 20;

fn written(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).and_then(|data| data.modified()).ok()
}

#[test]
fn twenty_kills_change_nothing() {
    let folder = Folder::new("kill");
    folder.train(&format!("{TRAINING} --save whole.safetensors"));
    let state = folder.0.join("part.safetensors");
    let line = || {
        let resume = if state.exists() { "--resume part.safetensors" } else { "" };
        format!("{TRAINING} --save part.safetensors --save-every 3 {resume}")
    };
    for kill in 0..KILLS {
        let mut command = folder.command(&line());
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // After none, one or two files, and a while that no clock tick divides; the first one makes sure that there is a file.
        let files = if kill == 0 { 1 } else { kill * 7 % 3 };
        let mut last = written(&state);
        for _ in 0..files {
            while written(&state) == last {
                assert!(child.try_wait().unwrap().is_none(), "the training ended before kill {kill}");
                sleep(Duration::from_micros(200));
            }
            last = written(&state);
        }
        sleep(Duration::from_micros(kill * 7_919 % 3_001));
        child.kill().unwrap();
        assert!(!child.wait().unwrap().success(), "the training ended before kill {kill}");
    }
    folder.train(&line());
    assert!(folder.read("part.safetensors") == folder.read("whole.safetensors"), "the states differ");
}
