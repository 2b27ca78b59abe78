//! Settings: a value for each knob of a method, drawn or perturbed from (seed, stage, knob, index) alone.

use candle_core::{Result, bail};
use kronwake::nn::init::Stream;
use serde_json::{Map, Value};
use std::fmt;

/// Where the values of a knob lie, and how they are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Range {
    /// Between two numbers, the logarithm uniform.
    LogUniform(f64, f64),
    /// Between two numbers.
    Uniform(f64, f64),
    /// One of a list.
    Choice(&'static [&'static str]),
}

/// An option that is tuned.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Knob {
    pub name: &'static str,
    pub range: Range,
}

/// A value for each knob of a method: a number, or the name of a choice.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Setting(pub Map<String, Value>);

/// How far [`Setting::near`] goes: the standard deviation as a fraction of the range (of its logarithm, where that is
/// uniform), and the probability that a choice is drawn anew.
const SPREAD: f64 = 0.1;
const REDRAW: f64 = 0.2;

impl Setting {
    /// Setting number `index` of a random search. Knobs of the same name draw the same place of their range in all
    /// methods: methods that share knobs are compared on the same settings.
    pub fn random(knobs: impl Iterator<Item = Knob>, seed: u64, index: usize) -> Self {
        let draw = |knob: Knob| {
            let place = Stream::new(seed, &format!("random {}", knob.name), index).uniform(0);
            (knob.name.to_string(), knob.range.at(place))
        };
        Self(knobs.map(draw).collect())
    }

    /// Number `index` of the settings near this one: log-normal (normal, where the range is not logarithmic) factors,
    /// cut at the ends of the range.
    pub fn near(&self, knobs: impl Iterator<Item = Knob>, seed: u64, index: usize) -> Result<Self> {
        let mut near = Map::new();
        for knob in knobs {
            let Some(value) = self.0.get(knob.name) else { bail!("the setting {self} lacks {}", knob.name) };
            let stream = Stream::new(seed, &format!("near {}", knob.name), index);
            let (first, second) = (stream.uniform(0), stream.uniform(1));
            let moved = match knob.range {
                Range::Choice(_) if first < REDRAW => knob.range.at(second),
                Range::Choice(_) => value.clone(),
                range => {
                    // Box and Muller; `1 - first` is not 0.
                    let normal = (-2.0 * (1.0 - first).ln()).sqrt() * (std::f64::consts::TAU * second).cos();
                    range.at((range.place(number(value)?) + SPREAD * normal).clamp(0.0, 1.0))
                }
            };
            near.insert(knob.name.to_string(), moved);
        }
        Ok(Self(near))
    }

    /// The number `name`.
    pub fn number(&self, name: &str) -> Result<f64> {
        match self.0.get(name) {
            Some(value) => number(value),
            None => bail!("the setting {self} lacks {name}"),
        }
    }

    /// The choice `name`.
    pub fn choice(&self, name: &str) -> Result<&str> {
        match self.0.get(name) {
            Some(Value::String(text)) => Ok(text),
            _ => bail!("the setting {self} has no choice of {name}"),
        }
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for (i, (name, value)) in self.0.iter().enumerate() {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_string);
            write!(f, "{}{name} {text}", if i == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

fn number(value: &Value) -> Result<f64> {
    match value.as_f64() {
        Some(number) => Ok(number),
        None => bail!("expected a number, found {value}"),
    }
}

impl Range {
    /// The value at a place in `[0, 1]`, numbers to four digits: these are read from JSON as they were written.
    fn at(self, place: f64) -> Value {
        let (value, low, high) = match self {
            Self::LogUniform(low, high) => (low * (high / low).powf(place), low, high),
            Self::Uniform(low, high) => (low + (high - low) * place, low, high),
            Self::Choice(list) => {
                let text = list[((place * list.len() as f64) as usize).min(list.len() - 1)];
                return text.parse::<f64>().map_or_else(|_| text.into(), Value::from);
            }
        };
        let rounded = format!("{value:.3e}").parse().unwrap_or(value);
        rounded.clamp(low, high).into()
    }

    /// The place in `[0, 1]` of a number; 0 for a choice, which has none.
    fn place(self, value: f64) -> f64 {
        match self {
            Self::LogUniform(low, high) => (value / low).ln() / (high / low).ln(),
            Self::Uniform(low, high) => (value - low) / (high - low),
            Self::Choice(_) => 0.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOBS: [Knob; 4] = [
        Knob { name: "lr", range: Range::LogUniform(1e-3, 1.0) },
        Knob { name: "rho", range: Range::Uniform(0.05, 0.5) },
        Knob { name: "decay", range: Range::Choice(&["0.5", "0.8", "0.95"]) },
        Knob { name: "fisher", range: Range::Choice(&["sampled", "empirical"]) },
    ];

    fn all(f: impl Fn(usize) -> Setting) -> Vec<Setting> {
        (0..2000).map(f).collect()
    }

    fn numbers(settings: &[Setting], name: &str) -> Vec<f64> {
        settings.iter().map(|s| s.number(name).unwrap()).collect()
    }

    #[test]
    fn random_settings_fill_their_ranges() {
        let settings = all(|i| Setting::random(KNOBS.into_iter(), 0, i));
        // The share below the middle of the range: a half, within five standard errors.
        for (name, low, middle, high) in
            [("lr", 1e-3, 1e-3f64.sqrt(), 1.0), ("rho", 0.05, 0.275, 0.5), ("decay", 0.5, 0.8, 0.95)]
        {
            let values = numbers(&settings, name);
            assert!(values.iter().all(|v| (low..=high).contains(v)), "{name}");
            let below = values.iter().filter(|&&v| v < middle).count() as f64 / 2000.0;
            let expected = if name == "decay" { 1.0 / 3.0 } else { 0.5 };
            assert!((below - expected).abs() < 0.056, "{name}: {below}");
        }
        assert!(settings.iter().any(|s| s.choice("fisher").unwrap() == "empirical"));
    }

    #[test]
    fn near_settings_stay_in_range_and_have_the_spread() {
        let start = Setting::random(KNOBS.into_iter(), 0, 3);
        let near = all(|i| start.near(KNOBS.into_iter(), 0, i).unwrap());
        let rho = numbers(&near, "rho");
        assert!(rho.iter().all(|v| (0.05..=0.5).contains(v)));
        let middle = Setting([("lr".to_string(), Value::from(0.03))].into_iter().collect());
        let near = all(|i| middle.near(KNOBS.into_iter().take(1), 0, i).unwrap());
        let logs: Vec<f64> = numbers(&near, "lr").iter().map(|v| (v / 0.03).ln()).collect();
        let sd = (logs.iter().map(|l| l * l).sum::<f64>() / 2000.0).sqrt();
        assert!((sd - 0.1 * 1000f64.ln()).abs() < 0.06, "{sd}");
    }

    #[test]
    fn settings_are_reproducible_through_json_and_shared_by_name() {
        for index in 0..200 {
            let setting = Setting::random(KNOBS.into_iter(), 5, index);
            let text = Value::Object(setting.0.clone()).to_string();
            let Ok(Value::Object(read)) = serde_json::from_str(&text) else { panic!("{text}") };
            assert_eq!(Setting(read), setting);
            let fewer = Setting::random(KNOBS.into_iter().take(1), 5, index);
            assert_eq!(fewer.number("lr").unwrap(), setting.number("lr").unwrap());
            assert_ne!(setting, Setting::random(KNOBS.into_iter(), 6, index));
        }
        let setting = Setting::random(KNOBS.into_iter(), 5, 0);
        assert!(setting.number("fisher").is_err() && setting.choice("lr").is_err());
        assert!(setting.number("momentum").unwrap_err().to_string().contains("lacks momentum"));
    }
}
