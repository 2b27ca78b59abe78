//! Programs whose reader ends before them, as `head` does.

use crate::folder::Folder;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;

/// What POSIX calls SIGPIPE.
const CLOSED_PIPE: i32 = 13;

#[test]
fn a_closed_pipe_ends_a_program_without_a_panic() {
    let folder = Folder::new("pipe");
    for (program, line) in [
        ("mnist", "--optimizer sgd --model mlp:784-10 --epochs 20 --threads 1"),
        ("constrained", "--epochs 1"),
        ("finetune", "--model mlp:784-10 --base-epochs 1 --epochs 9 --optimizer adamw --threads 1"),
    ] {
        let mut command = folder.command_of(program, line);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut first = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut first).unwrap();
        assert!(first.contains("Fashion-MNIST"), "{program}: {first}");
        let mut error = String::new();
        child.stderr.take().unwrap().read_to_string(&mut error).unwrap();
        assert_eq!(error, "", "{program}");
        assert_eq!(child.wait().unwrap().signal(), Some(CLOSED_PIPE), "{program}");
    }
}
