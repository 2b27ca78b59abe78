//! The examples as a user starts them, in a folder of their own.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Where `cargo test` builds an example: this test is target/PROFILE/deps/NAME, the example target/PROFILE/examples/NAME.
fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    profile.join("examples").join(format!("{name}{}", std::env::consts::EXE_SUFFIX))
}

/// A folder of its own for a test, removed at its end.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("kronwake-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// The example `mnist`, to be run here, with the words of `line`. `KRONWAKE_MNIST` says where it is; else it lies where
    /// `cargo test` builds it.
    pub fn command(&self, line: &str) -> Command {
        let program = std::env::var_os("KRONWAKE_MNIST").map_or_else(|| example("mnist"), PathBuf::from);
        self.program(program, line)
    }

    /// Another example.
    pub fn command_of(&self, name: &str, line: &str) -> Command {
        self.program(example(name), line)
    }

    fn program(&self, program: PathBuf, line: &str) -> Command {
        assert!(program.exists(), "{} is missing: `cargo build --examples` makes it", program.display());
        let mut command = Command::new(program);
        command.args(line.split_whitespace()).current_dir(&self.0);
        command
    }

    pub fn run(&self, line: &str) -> Output {
        self.command(line).output().unwrap()
    }

    /// Runs the example and requires success.
    pub fn train(&self, line: &str) -> String {
        let output = self.run(line);
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{line}\n{out}\n{err}");
        out.into_owned()
    }

    /// Runs the example and requires failure with `code`; the error output.
    pub fn fail(&self, line: &str, code: i32) -> String {
        let output = self.run(line);
        assert_eq!(output.status.code(), Some(code), "{line}");
        String::from_utf8(output.stderr).unwrap()
    }

    pub fn read(&self, file: &str) -> Vec<u8> {
        std::fs::read(self.0.join(file)).unwrap()
    }

    /// The objects of a log.
    pub fn log(&self, file: &str) -> Vec<Value> {
        let text = String::from_utf8(self.read(file)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
