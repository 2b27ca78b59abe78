//! The log of a study: a first line with the protocol, then a line a finished run.

use super::plan::{Job, Stage};
use super::setting::Setting;
use crate::jsonl::{self, Lines};
use candle_core::{Result, bail};
use clap::ValueEnum;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// Method, stage and number of a run.
pub type Key = (String, Stage, usize);
/// The finished runs.
pub type Done = BTreeMap<Key, Record>;

/// A finished run.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    pub method: String,
    pub stage: Stage,
    pub index: usize,
    pub seed: u64,
    pub setting: Setting,
    /// Those planned; the lists below hold an element a completed epoch.
    pub epochs: usize,
    /// Held-out accuracy, in 0..1.
    pub held: Vec<f64>,
    /// Test accuracy, in the stage `final` alone.
    pub test: Vec<f64>,
    /// Mean training loss of the epoch.
    pub loss: Vec<f64>,
    /// Training time since the start.
    pub seconds: Vec<f64>,
    /// Whether a loss, or what an optimizer made of it, was not finite.
    pub diverged: bool,
}

/// What a run that diverged is worth: guessing one of ten classes.
pub const CHANCE: f64 = 0.1;

impl Record {
    /// Without results yet.
    pub fn new(job: &Job) -> Self {
        let (method, stage, index) = job.key();
        let (held, test, loss, seconds) = (vec![], vec![], vec![], vec![]);
        let (seed, setting, epochs, diverged) = (job.seed, job.setting.clone(), job.epochs, false);
        Self { method, stage, index, seed, setting, epochs, held, test, loss, seconds, diverged }
    }

    pub fn key(&self) -> Key {
        (self.method.clone(), self.stage, self.index)
    }

    /// The held-out accuracy in the end.
    pub fn held_out(&self) -> f64 {
        self.last(&self.held)
    }

    /// The test accuracy in the end.
    pub fn tested(&self) -> f64 {
        self.last(&self.test)
    }

    fn last(&self, list: &[f64]) -> f64 {
        list.last().filter(|_| !self.diverged).copied().unwrap_or(CHANCE)
    }

    /// The first epoch (from 1) whose held-out accuracy is at least `accuracy`, with the seconds until its end.
    pub fn reached(&self, accuracy: f64) -> Option<(usize, f64)> {
        let epoch = self.held.iter().position(|&held| held >= accuracy).filter(|_| !self.diverged)?;
        Some((epoch + 1, self.seconds.get(epoch).copied()?))
    }

    fn json(&self) -> Value {
        let Self { method, stage, index, seed, epochs, held, test, loss, seconds, diverged, .. } = self;
        let setting = &self.setting.0;
        let stage = stage.name();
        json!({
            "method": method, "stage": stage, "index": index, "seed": seed, "setting": setting, "epochs": epochs,
            "held": held, "test": test, "loss": loss, "seconds": seconds, "diverged": diverged,
        })
    }

    fn parse(value: &Value) -> Option<Self> {
        let numbers =
            |name: &str| -> Option<Vec<f64>> { value[name].as_array()?.iter().map(Value::as_f64).collect() };
        let number = |name: &str| value[name].as_u64();
        Some(Self {
            method: value["method"].as_str()?.into(),
            stage: Stage::from_str(value["stage"].as_str()?, false).ok()?,
            index: number("index")? as usize,
            seed: number("seed")?,
            setting: Setting(value["setting"].as_object()?.clone()),
            epochs: number("epochs")? as usize,
            held: numbers("held")?,
            test: numbers("test")?,
            loss: numbers("loss")?,
            seconds: numbers("seconds")?,
            diverged: value["diverged"].as_bool()?,
        })
    }
}

/// The log as read: the protocol, the finished runs, and the number of bytes up to the end of the last whole line.
struct Read {
    protocol: Value,
    done: Done,
    whole: usize,
}

/// A last line that a killed run left unfinished is ignored.
fn parse(path: &Path, text: &str) -> Result<Option<Read>> {
    let whole = text.rfind('\n').map_or(0, |end| end + 1);
    let mut read: Option<Read> = None;
    for (number, line) in text[..whole].lines().enumerate() {
        let value: Value = serde_json::from_str(line).unwrap_or_default();
        match (&mut read, Record::parse(&value)) {
            (None, _) if value["protocol"].is_object() => {
                read = Some(Read { protocol: value["protocol"].clone(), done: Done::new(), whole });
            }
            (Some(read), Some(record)) => {
                read.done.insert(record.key(), record);
            }
            _ => bail!("{}: line {} is none of a study's log", path.display(), number + 1),
        }
    }
    Ok(read)
}

/// Protocol and runs of the log `path`.
pub fn read(path: &Path) -> Result<(Value, Done)> {
    let Some(text) = jsonl::text(path)? else { bail!("{}: cannot be read: no such file", path.display()) };
    match parse(path, &text)? {
        Some(read) => Ok((read.protocol, read.done)),
        None => bail!("{}: holds no study", path.display()),
    }
}

/// A log that grows.
pub struct Log(Lines);

impl Log {
    /// Goes on with the log `path`, or begins it.
    ///
    /// # Errors
    /// When the file is no log, or one of another protocol.
    pub fn open(path: &Path, protocol: &Value) -> Result<(Self, Done)> {
        let found = jsonl::text(path)?.map(|text| parse(path, &text)).transpose()?.flatten();
        if let Some(Read { protocol: other, .. }) = &found
            && other != protocol
        {
            bail!("{}: is a study with {other}, not with {protocol}; choose another --out", path.display());
        }
        let mut log = Self(Lines::append(path)?);
        match found {
            Some(Read { done, whole, .. }) => log.cut(whole).map(|()| (log, done)),
            None => {
                log.cut(0)?;
                log.0.write(&json!({ "protocol": protocol }))?;
                Ok((log, Done::new()))
            }
        }
    }

    fn cut(&mut self, length: usize) -> Result<()> {
        match self.0.file.set_len(length as u64) {
            Ok(()) => Ok(()),
            Err(e) => bail!("{}: cannot be cut to its whole lines ({e})", self.0.name),
        }
    }

    pub fn append(&mut self, record: &Record) -> Result<()> {
        self.0.write(&record.json())
    }
}

#[cfg(test)]
mod tests {
    use super::super::methods::METHODS;
    use super::*;
    use std::io::Write;

    fn record(index: usize) -> Record {
        let setting = Setting::random(METHODS[2].knobs(), 0, index);
        let job = Job { method: &METHODS[2], stage: Stage::Random, index, seed: 3, setting, epochs: 2 };
        let (held, loss, seconds) = (vec![0.97, 0.981], vec![0.3, 0.1], vec![1.5, 2.75]);
        Record { held, loss, seconds, ..Record::new(&job) }
    }

    #[test]
    fn a_torn_line_is_overwritten_and_a_foreign_file_refused() {
        let path = std::env::temp_dir().join(format!("kronwake-study-{}.jsonl", std::process::id()));
        let protocol = json!({ "seed": 1 });
        for torn in ["", "{\"method\":\"kf"] {
            let _ = std::fs::remove_file(&path);
            let (mut log, done) = Log::open(&path, &protocol).unwrap();
            assert!(done.is_empty());
            log.append(&record(0)).unwrap();
            writeln!(log.0.file, "{torn}").unwrap();
            // Without the line's end, as a killed process leaves it.
            let length = std::fs::read(&path).unwrap().len();
            log.cut(length - if torn.is_empty() { 5 } else { 1 }).unwrap();
            let (mut log, done) = Log::open(&path, &protocol).unwrap();
            assert_eq!(done.len(), usize::from(!torn.is_empty()));
            log.append(&record(1)).unwrap();
            let (found, done) = read(&path).unwrap();
            assert_eq!((found, &done[&record(1).key()]), (protocol.clone(), &record(1)));
        }
        let refused = |result: Result<(Log, Done)>| result.err().unwrap().to_string();
        assert!(refused(Log::open(&path, &json!({ "seed": 2 }))).contains("is a study with {\"seed\":1}"));
        std::fs::write(&path, "{\"protocol\":{\"seed\":1}}\n{}\n").unwrap();
        assert!(refused(Log::open(&path, &protocol)).contains("line 2 is none of a study's log"));
        std::fs::write(&path, "a poem\n").unwrap();
        assert!(refused(Log::open(&path, &protocol)).contains("line 1 is none"));
        std::fs::remove_file(&path).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("cannot be read"));
    }

    #[test]
    fn a_run_that_diverged_reached_nothing() {
        let mut run = record(0);
        assert_eq!((run.held_out(), run.reached(0.98), run.reached(0.99)), (0.981, Some((2, 2.75)), None));
        assert_eq!(run.reached(0.97), Some((1, 1.5)));
        run.diverged = true;
        assert_eq!((run.held_out(), run.reached(0.5)), (CHANCE, None));
    }
}
