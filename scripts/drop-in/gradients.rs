//! Builds models of candle-transformers, small and with random weights, on `kronwake::nn`, and counts the variables that get a gradient
//! from the mean square of the outputs. Exits with 1 unless all do that the forward pass uses, but for models that candle cannot
//! differentiate.

use candle::{DType, Device, Result, Tensor, Var, D};
use candle_transformers::models::*;
use kronwake::nn::{Activation, Module, ModuleT, VarBuilder, VarMap};
use std::collections::HashSet;

type Outputs = Result<Vec<Tensor>>;

struct Model {
    name: &'static str,
    /// Whether a variable is no parameter: a statistic, a fixed table.
    left_out: fn(&str) -> bool,
    run: fn(VarBuilder<'static>) -> Outputs,
}

/// Errors of candle's own tensor methods, which no layer of `kronwake::nn` can replace: reported, and no failure.
const OF_CANDLE: &str = "backward not supported for maxpool2d";

fn tokens(dims: (usize, usize)) -> Result<Tensor> {
    let ids: Vec<u32> = (0..dims.0 * dims.1).map(|i| (i * 7 % 50) as u32).collect();
    Tensor::from_vec(ids, dims, &Device::Cpu)
}

fn noise(dims: &[usize]) -> Result<Tensor> {
    Tensor::randn(0f32, 1f32, dims, &Device::Cpu)
}

fn json<T: serde::de::DeserializeOwned>(value: serde_json::Value) -> T {
    serde_json::from_value(value).expect("a configuration")
}

fn all(_: &str) -> bool {
    false
}

fn statistics(name: &str) -> bool {
    name.contains("running_")
}

/// A small decoder's configuration, with the fields of many.
fn decoder<T: serde::de::DeserializeOwned>() -> T {
    json(serde_json::json!({
        "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 4, "attention_bias": false, "max_position_embeddings": 16, "sliding_window": 16,
        "max_window_layers": 2, "tie_word_embeddings": false, "rope_theta": 1e4, "rms_norm_eps": 1e-6,
        "use_sliding_window": false, "hidden_act": "silu", "use_flash_attn": false, "norm_epsilon": 1e-6, "use_bias": true,
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 4, "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 20.0, "rope_local_base_freq": 1e4, "sliding_window_pattern": 2,
        "partial_rotary_factor": 1.0, "layer_norm_eps": 1e-6, "use_cache": false, "num_experts_per_tok": 2, "num_local_experts": 3
    }))
}

/// A small encoder's configuration, with the fields of many.
fn encoder<T: serde::de::DeserializeOwned>() -> T {
    json(serde_json::json!({
        "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "type_vocab_size": 2, "initializer_range": 0.02, "pad_token_id": 0,
        "position_embedding_type": "absolute", "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 32, "activation": "gelu",
        "global_attn_every_n_layers": 2, "global_rope_theta": 1e4, "local_attention": 4, "local_rope_theta": 1e4,
        "relative_attention": true, "max_relative_positions": -1, "position_biased_input": false, "position_buckets": 4,
        "pos_att_type": "p2c|c2p", "share_att_key": true, "norm_rel_ebd": "layer_norm"
    }))
}

fn models() -> Vec<Model> {
    let model = |name, left_out, run| Model { name, left_out, run };
    vec![
        model("bert", all, |vb| {
            let config = bert::Config {
                vocab_size: 50,
                hidden_size: 16,
                num_hidden_layers: 2,
                num_attention_heads: 4,
                intermediate_size: 32,
                max_position_embeddings: 16,
                ..Default::default()
            };
            let x = tokens((2, 7))?;
            Ok(vec![bert::BertModel::load(vb, &config)?.forward(&x, &x.zeros_like()?, None)?])
        }),
        model("vit", all, |vb| {
            let config = vit::Config {
                hidden_size: 16,
                num_hidden_layers: 2,
                num_attention_heads: 4,
                intermediate_size: 32,
                hidden_act: Activation::Gelu,
                layer_norm_eps: 1e-6,
                image_size: 8,
                patch_size: 4,
                num_channels: 3,
                qkv_bias: true,
            };
            Ok(vec![vit::Model::new(&config, 5, vb)?.forward(&noise(&[2, 3, 8, 8])?)?])
        }),
        model("llama", all, |vb| {
            let config = llama::Config {
                hidden_size: 16,
                intermediate_size: 32,
                vocab_size: 50,
                num_hidden_layers: 2,
                num_attention_heads: 4,
                num_key_value_heads: 2,
                max_position_embeddings: 16,
                ..llama::Config::config_7b_v2(false)
            };
            let mut cache = llama::Cache::new(false, DType::F32, &config, &Device::Cpu)?;
            Ok(vec![llama::Llama::load(vb, &config)?.forward(&tokens((2, 7))?, 0, &mut cache)?])
        }),
        model("qwen2", all, |vb| {
            let config: qwen2::Config = decoder();
            Ok(vec![qwen2::ModelForCausalLM::new(&config, vb)?.forward(&tokens((2, 7))?, 0)?])
        }),
        model("qwen3", all, |vb| {
            let config: qwen3::Config = decoder();
            Ok(vec![qwen3::ModelForCausalLM::new(&config, vb)?.forward(&tokens((2, 7))?, 0)?])
        }),
        model("gemma3", all, |vb| {
            let config: gemma3::Config = decoder();
            Ok(vec![gemma3::Model::new(false, &config, vb)?.forward(&tokens((2, 7))?, 0)?])
        }),
        model("t5", all, |vb| {
            let config = t5::Config {
                vocab_size: 50,
                d_model: 16,
                d_kv: 4,
                d_ff: 32,
                num_layers: 2,
                num_heads: 4,
                use_cache: false,
                ..Default::default()
            };
            let mut t5 = t5::T5ForConditionalGeneration::load(vb, &config)?;
            Ok(vec![t5.forward(&tokens((2, 7))?, &tokens((2, 5))?)?])
        }),
        model("convnext", all, |vb| {
            Ok(vec![convnext::convnext(&convnext::Config::atto(), 5, vb)?.forward(&noise(&[1, 3, 64, 64])?)?])
        }),
        // The encoder's positions are a fixed table, read as a variable where the builder makes variables.
        model("whisper", all, |vb| {
            let config = whisper::Config {
                num_mel_bins: 8,
                max_source_positions: 10,
                d_model: 16,
                encoder_attention_heads: 4,
                encoder_layers: 2,
                vocab_size: 50,
                max_target_positions: 12,
                decoder_attention_heads: 4,
                decoder_layers: 2,
                suppress_tokens: Vec::new(),
            };
            let mut whisper = whisper::model::Whisper::load(&vb, config)?;
            let audio = whisper.encoder.forward(&noise(&[2, 8, 20])?, true)?;
            let hidden = whisper.decoder.forward(&tokens((2, 5))?, &audio, true)?;
            Ok(vec![whisper.decoder.final_linear(&hidden)?])
        }),
        model("clip", all, |vb| {
            let mut config = clip::ClipConfig::vit_base_patch32();
            config.text_config = clip::text_model::ClipTextConfig {
                vocab_size: 50,
                embed_dim: 16,
                intermediate_size: 32,
                max_position_embeddings: 12,
                num_hidden_layers: 2,
                num_attention_heads: 4,
                projection_dim: 8,
                ..config.text_config
            };
            config.vision_config = clip::vision_model::ClipVisionConfig {
                embed_dim: 16,
                intermediate_size: 32,
                num_hidden_layers: 2,
                num_attention_heads: 4,
                projection_dim: 8,
                image_size: 8,
                patch_size: 4,
                ..config.vision_config
            };
            let (text, image) =
                clip::ClipModel::new(vb, &config)?.forward(&noise(&[2, 3, 8, 8])?, &tokens((3, 7))?)?;
            Ok(vec![text, image])
        }),
        model("vgg", all, |vb| {
            Ok(vec![vgg::Vgg::new(vb, vgg::Models::Vgg13)?.forward_t(&noise(&[3, 224, 224])?, false)?])
        }),
        model("efficientnet", statistics, |vb| {
            let config = efficientnet::MBConvConfig::b0();
            Ok(vec![efficientnet::EfficientNet::new(vb, config, 5)?.forward(&noise(&[1, 3, 64, 64])?)?])
        }),
        model("resnet", statistics, |vb| {
            Ok(vec![resnet::resnet18(5, vb)?.forward(&noise(&[1, 3, 64, 64])?)?])
        }),
        model("mobilenetv4", statistics, |vb| {
            let config = mobilenetv4::Config::small();
            Ok(vec![mobilenetv4::mobilenetv4(&config, 5, vb)?.forward(&noise(&[1, 3, 64, 64])?)?])
        }),
        model("bigcode", all, |vb| {
            let config = bigcode::Config {
                vocab_size: 50,
                max_position_embeddings: 16,
                num_hidden_layers: 2,
                hidden_size: 16,
                layer_norm_epsilon: 1e-5,
                n_inner: Some(32),
                num_attention_heads: 4,
                multi_query: true,
                use_cache: false,
            };
            Ok(vec![bigcode::GPTBigCode::load(vb, config)?.forward(&tokens((2, 7))?, 0)?])
        }),
        model(
            "llama2_c",
            |name| name.contains("rot."),
            |vb| {
                let config = llama2_c::Config {
                    dim: 16,
                    hidden_dim: 32,
                    n_layers: 2,
                    n_heads: 4,
                    n_kv_heads: 2,
                    vocab_size: 50,
                    seq_len: 16,
                    norm_eps: 1e-5,
                };
                let mut cache = llama2_c::Cache::new(false, &config, vb.pp("rot"))?;
                Ok(vec![llama2_c::Llama::load(vb, config)?.forward(&tokens((2, 7))?, 0, &mut cache)?])
            },
        ),
        model("gemma2", all, |vb| {
            Ok(vec![gemma2::Model::new(false, &decoder(), vb)?.forward(&tokens((2, 7))?, 0)?])
        }),
        model("mistral", all, |vb| {
            Ok(vec![mistral::Model::new(&decoder(), vb)?.forward(&tokens((2, 7))?, 0)?])
        }),
        // An expert that no token is sent to gets none; the gate's weights pass through the host.
        model(
            "mixtral",
            |name| name.contains("block_sparse_moe"),
            |vb| Ok(vec![mixtral::Model::new(&decoder(), vb)?.forward(&tokens((2, 7))?, 0)?]),
        ),
        model("olmo2", all, |vb| Ok(vec![olmo2::Model::new(&decoder(), vb)?.forward(&tokens((2, 7))?, 0)?])),
        model("phi3", all, |vb| Ok(vec![phi3::Model::new(&decoder(), vb)?.forward(&tokens((2, 7))?, 0)?])),
        model("stable_lm", all, |vb| {
            Ok(vec![stable_lm::Model::new(&decoder(), vb)?.forward(&tokens((2, 7))?, 0)?])
        }),
        model("starcoder2", all, |vb| {
            Ok(vec![starcoder2::Model::new(&decoder(), vb)?.forward(&tokens((2, 7))?, 0)?])
        }),
        model("mamba", all, |vb| {
            let config: mamba::Config = json(serde_json::json!({
                "d_model": 16, "n_layer": 2, "vocab_size": 50, "pad_vocab_size_multiple": 2
            }));
            let (model, x) = (mamba::Model::new(&config, vb)?, tokens((1, 5))?);
            let mut state = mamba::State::new(1, &config, DType::F32, &Device::Cpu)?;
            (0..5).map(|at| model.forward(&x.narrow(1, at, 1)?.squeeze(1)?, &mut state)).collect()
        }),
        model("distilbert", all, |vb| {
            let x = tokens((2, 7))?;
            let mask = x.zeros_like()?.to_dtype(DType::U8)?.reshape((2, 1, 1, 7))?;
            Ok(vec![distilbert::DistilBertModel::load(vb, &encoder())?.forward(&x, &mask)?])
        }),
        model("modernbert", all, |vb| {
            let x = tokens((2, 7))?;
            Ok(vec![modernbert::ModernBertForMaskedLM::load(vb, &encoder())?.forward(&x, &x.ones_like()?)?])
        }),
        model("debertav2", all, |vb| {
            Ok(vec![debertav2::DebertaV2Model::load(vb, &encoder())?.forward(
                &tokens((2, 7))?,
                None,
                None,
            )?])
        }),
        model("jina_bert", all, |vb| {
            let config = jina_bert::Config::new(
                50,
                16,
                2,
                4,
                32,
                Activation::Gelu,
                16,
                2,
                0.02,
                1e-6,
                0,
                jina_bert::PositionEmbeddingType::Alibi,
            );
            Ok(vec![jina_bert::BertModel::new(vb, &config)?.forward(&tokens((2, 7))?)?])
        }),
        model("xlm_roberta", all, |vb| {
            let x = tokens((2, 7))?;
            let model = xlm_roberta::XLMRobertaForMaskedLM::new(&encoder(), vb)?;
            Ok(vec![model.forward(&x, &x.ones_like()?, &x.zeros_like()?, None, None, None)?])
        }),
        model("siglip", all, |vb| {
            let config: siglip::Config = json(serde_json::json!({
                "text_config": {
                    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "max_position_embeddings": 7
                },
                "vision_config": {
                    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 8,
                    "patch_size": 4
                }
            }));
            let (text, image) =
                siglip::Model::new(&config, vb)?.forward(&noise(&[2, 3, 8, 8])?, &tokens((3, 7))?)?;
            Ok(vec![text, image])
        }),
        // The encoder ends in whole numbers.
        model(
            "encodec",
            |name| !name.starts_with("decoder."),
            |vb| {
                let config = encodec::Config {
                    hidden_size: 8,
                    num_filters: 4,
                    codebook_size: 16,
                    codebook_dim: Some(8),
                    ..Default::default()
                };
                let codes = tokens((2, 4))?.affine(0.3, 0.)?.reshape((1, 2, 4))?;
                Ok(vec![encodec::Model::new(&config, vb)?.decode(&codes)?])
            },
        ),
    ]
}

fn counted(model: &Model) -> Result<(usize, Vec<String>)> {
    let map = VarMap::new();
    let outputs = (model.run)(VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu));
    // Some layers start at zero or one: everything is moved, and the model built again on the same variables.
    drop(outputs?);
    let mut vars: Vec<(String, Var)> = {
        let data = map.data().lock().expect("no thread panicked");
        data.iter().map(|(name, var)| (name.clone(), var.clone())).collect()
    };
    for (_, var) in &vars {
        var.set(&(var.as_tensor() + (var.randn_like(0., 1.)? * 0.05)?)?)?;
    }
    // Where a convolution of size 0 stands for none, its norm is built and not used.
    let names: HashSet<String> = vars.iter().map(|(name, _)| name.clone()).collect();
    let used = |name: &str| match name.split_once(".bn.") {
        Some((block, _)) if block.ends_with("dw_start") || block.ends_with("dw_mid") => {
            names.contains(&format!("{block}.conv.weight"))
        }
        _ => true,
    };
    vars.retain(|(name, _)| !(model.left_out)(name) && used(name));
    let outputs = (model.run)(VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu))?;
    let mut loss = Tensor::zeros((), DType::F32, &Device::Cpu)?;
    for output in &outputs {
        loss = (loss + output.sqr()?.mean_all()?)?;
    }
    let grads = loss.backward()?;
    let without = |var: &Var| -> Result<bool> {
        let Some(grad) = grads.get(var) else { return Ok(true) };
        let largest = grad.abs()?.flatten_all()?.max(D::Minus1)?.to_scalar::<f32>()?;
        Ok(!(largest.is_finite() && largest > 0.))
    };
    let mut missing = Vec::new();
    for (name, var) in &vars {
        if without(var)? {
            missing.push(name.clone());
        }
    }
    missing.sort();
    Ok((vars.len(), missing))
}

fn main() {
    let mut complete = true;
    for model in models() {
        let line = match counted(&model) {
            Ok((vars, missing)) => {
                complete &= missing.is_empty();
                let names = if missing.is_empty() {
                    String::new()
                } else {
                    format!("; none, or not finite: {}", missing.join(", "))
                };
                format!("{}/{vars} variables with a gradient{names}", vars - missing.len())
            }
            Err(error) => {
                let error = error.to_string();
                let error = error.lines().next().unwrap_or_default();
                complete &= error.contains(OF_CANDLE);
                format!("failed: {error}")
            }
        };
        println!("{:<14} {line}", model.name);
    }
    std::process::exit(i32::from(!complete));
}
