//! Bytes of the optimizers' state beside AdamW's, for models of several sizes: `cargo bench --bench memory`.

use candle_core::{DType, Device, Result};
use kronwake::curvature::{Beyond, Damping, FactorLimit, Inverse};
use kronwake::nn::{self, VarBuilder, VarMap};
use kronwake::optim::{Group, Groups, NaturalGradient, Params, So, TwoRate, UpdateRule, Wake};
use kronwake::tape::Tape;
use kronwake_cli::models::{bert, llama};
use serde_json::json;

struct Model {
    vars: VarMap,
    tape: Tape,
}

impl Model {
    fn new<M>(build: impl FnOnce(&VarBuilder) -> Result<M>) -> Result<Self> {
        let (vars, tape) = (VarMap::new(), Tape::new());
        tape.build(|| build(&VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu)))?;
        Ok(Self { vars, tape })
    }

    fn elements(&self) -> usize {
        self.vars.all_vars().iter().map(|var| var.elem_count()).sum()
    }

    /// Bytes of state and those of a step beside it.
    fn bytes(&self, wake: impl Into<Wake>, change: impl Fn(Params) -> Params) -> Result<[usize; 2]> {
        let summary =
            NaturalGradient::from_varmap(&self.vars, change(Params::of(wake, &self.tape)))?.summary();
        Ok([summary.bytes(), summary.workspace_bytes])
    }
}

fn lenet(vb: &VarBuilder) -> Result<()> {
    for (name, from, to) in [("fc1", 784, 300), ("fc2", 300, 100), ("fc3", 100, 10)] {
        nn::linear(from, to, vb.pp(name))?;
    }
    Ok(())
}

/// Four layers of 128 features, four heads.
fn decoder(vocabulary: usize, tied: bool, vb: &VarBuilder) -> Result<llama::Llama> {
    let config = json!({
        "vocab_size": vocabulary, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4,
        "num_attention_heads": 4, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied,
    });
    llama::Llama::new(&llama::Config::parse(&config)?, vb)
}

fn bert_base(vb: &VarBuilder) -> Result<bert::Bert> {
    let config = json!({
        "vocab_size": 30522, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 512, "type_vocab_size": 2, "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
    });
    bert::Bert::new(&bert::Config::parse(&config)?, vb)
}

/// The last layers of VGG-16.
fn vgg_classifier(vb: &VarBuilder) -> Result<()> {
    for (name, from, to) in [("fc1", 25088, 4096), ("fc2", 4096, 4096), ("fc3", 4096, 1000)] {
        nn::linear(from, to, vb.pp(name))?;
    }
    Ok(())
}

fn report(name: &str, model: &Model) -> Result<()> {
    let mib = |bytes: usize| format!("{:.2}", bytes as f64 / (1 << 20) as f64);
    let adamw = 2 * model.elements() * DType::F32.size_in_bytes();
    let runs = |rows| FactorLimit { rows, beyond: Beyond::BlockDiagonal };
    let limited = |factor_limit| model.bytes(So::default(), move |p| Params { factor_limit, ..p });
    let tables = Groups(vec![Group { rule: Some(UpdateRule::Adam), ..Group::named("*embed*") }]);
    let has_tables = tables.0.iter().any(|group| {
        model
            .vars
            .data()
            .lock()
            .is_ok_and(|data| data.keys().any(|var| var.contains(group.pattern.trim_matches('*'))))
    });
    let mut rows = vec![
        ("K-FAC", model.bytes(Wake::KFac, |p| p)?),
        ("SO", model.bytes(So::default(), |p| p)?),
        ("KLD-WRM", model.bytes(TwoRate::default(), |p| p)?),
        ("SO, no limit", limited(FactorLimit::NONE)?),
        ("SO, runs of 1024", limited(runs(1024))?),
        ("SO, runs of 256", limited(runs(256))?),
        (
            "SO, rank 128 beyond 256",
            limited(FactorLimit { rows: 256, beyond: Beyond::LowRank { rank: 128 } })?,
        ),
        ("SO, diagonal", limited(FactorLimit::DIAGONAL)?),
        (
            "SO, pi damping, Cholesky",
            model.bytes(So::default(), |p| Params {
                damping: Damping::Pi(0.003),
                inverse: Inverse::Cholesky,
                ..p
            })?,
        ),
    ];
    if has_tables {
        rows.push((
            "SO, tables by Adam",
            model.bytes(So::default(), |p| Params { groups: tables.clone(), ..p })?,
        ));
    }
    println!("\n{name}: {} parameters, AdamW {} MiB\n", model.elements(), mib(adamw));
    println!("| optimizer | state, MiB | times AdamW's | beside it in a step, MiB |\n|---|---|---|---|");
    for (what, [state, beside]) in rows {
        println!("| {what} | {} | {:.2} | {} |", mib(state), state as f64 / adamw as f64, mib(beside));
    }
    Ok(())
}

fn main() -> Result<()> {
    report("LeNet-300-100", &Model::new(lenet)?)?;
    report("Decoder, 4 layers of 128, 256 tokens", &Model::new(|vb| decoder(256, false, vb))?)?;
    report("Decoder, 4 layers of 128, 32,000 tokens, tied", &Model::new(|vb| decoder(32_000, true, vb))?)?;
    report("BERT-base", &Model::new(bert_base)?)?;
    report("The linear layers of VGG-16", &Model::new(vgg_classifier)?)
}
