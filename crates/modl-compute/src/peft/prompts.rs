//! `peft_type` PROMPT_TUNING, P_TUNING and PREFIX_TUNING: the types with virtual tokens, as of
//! version 0.21.2. Each file holds one tensor, `prompt_embeddings`, multiplied out where a network
//! made it.

use modl_core::{Error, ModuleConfig, Result, Site, SiteKind, Targets, Tensor, Tensors, no_grad};
use serde_json::{Map, Value, json};

use super::provenance::PromptDimensions;
use super::{Fields, PeftType, Provenance, Read, Written, object};
use crate::input::{
    EMBEDDING, PROJECTION, PTuning, PrefixTuning, PromptTuning, encode, entrance, prefixed, project,
};

pub(super) const PROMPT_TUNING: PeftType = PeftType {
    name: "PROMPT_TUNING",
    kind: "prompt_tuning",
    read: read_prompt,
    write: write_prompt,
    key: str::to_owned,
    unpack: None,
    pack: None,
};

pub(super) const P_TUNING: PeftType = PeftType {
    name: "P_TUNING",
    kind: "p_tuning",
    read: read_p,
    write: write_p,
    pack: Some(|all, _| pack(all, &[EMBEDDING], encode)),
    ..PROMPT_TUNING
};

pub(super) const PREFIX_TUNING: PeftType = PeftType {
    name: "PREFIX_TUNING",
    kind: "prefix_tuning",
    read: read_prefix,
    write: write_prefix,
    pack: Some(|all, _| pack(all, &PROJECTION, project)),
    ..PROMPT_TUNING
};

/// What the file holds: P itself, made by `multiply` where there is a network still.
fn pack(
    all: Tensors,
    network: &[&str],
    multiply: fn(&Tensors) -> Result<Tensor>,
) -> Result<Tensors> {
    match network.iter().all(|name| all.get(name).is_some()) {
        true => Ok(Tensors::new().with("prompt_embeddings", no_grad(|| multiply(&all))?)),
        false => Ok(all),
    }
}

/// The number of virtual tokens, and what PEFT notes of the backbone.
fn common(fields: &mut Fields, mut peft: Provenance) -> Result<(i64, i64, Provenance)> {
    let count = fields.required("num_virtual_tokens")?;
    let stacks: Option<i64> = fields.optional("num_transformer_submodules")?;
    // As PEFT works it out where it is not said.
    let usual = if peft.task_type.as_deref() == Some("SEQ_2_SEQ_LM") { 2 } else { 1 };
    peft.prompt = Some(PromptDimensions {
        num_transformer_submodules: stacks,
        token_dim: fields.optional("token_dim")?,
        num_layers: fields.optional("num_layers")?,
        num_attention_heads: fields.optional("num_attention_heads")?,
    });
    Ok((count, stacks.unwrap_or(usual), peft))
}

fn common_fields(count: i64, peft: &Provenance, others: Value) -> Map<String, Value> {
    let known = peft.prompt.clone().unwrap_or_default();
    let mut fields = object(json!({
        "modules_to_save": null,
        "num_attention_heads": known.num_attention_heads,
        "num_layers": known.num_layers,
        "num_transformer_submodules": known.num_transformer_submodules,
        "num_virtual_tokens": count,
        "token_dim": known.token_dim,
    }));
    fields.extend(object(others));
    fields
}

fn read_prompt(fields: &mut Fields, peft: Provenance) -> Result<Read> {
    let (num_virtual_tokens, num_transformer_submodules, mut peft) = common(fields, peft)?;
    // How the prompt started; the file has what became of it.
    peft.start = fields.rest(&[
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_name_or_path",
        "tokenizer_kwargs",
    ]);
    let standard = PromptTuning::default();
    let prompt = PromptTuning { num_virtual_tokens, num_transformer_submodules, peft, ..standard };
    Ok((Box::new(prompt), entrance()))
}

fn write_prompt(config: Value) -> Result<Written> {
    let prompt: PromptTuning = modl_core::from_json("prompt_tuning", config)?;
    if prompt.after_embeddings {
        return Err(Error::unsupported(
            "a prompt behind the embeddings in a PEFT folder",
            "PEFT puts prompts before positions are added; keep AdapterHub's format",
        ));
    }
    let start = json!({
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": null,
        "tokenizer_kwargs": null,
        "tokenizer_name_or_path": null,
    });
    let mut fields = common_fields(prompt.num_virtual_tokens, &prompt.peft, start);
    fields.extend(prompt.peft.start.clone());
    Ok((fields, prompt.peft))
}

fn read_p(fields: &mut Fields, peft: Provenance) -> Result<Read> {
    let (num_virtual_tokens, num_transformer_submodules, peft) = common(fields, peft)?;
    let standard = PTuning::default();
    let encoder = fields.optional("encoder_reparameterization_type")?;
    let p = PTuning {
        num_virtual_tokens,
        num_transformer_submodules,
        encoder_reparameterization_type: encoder.unwrap_or_default(),
        encoder_hidden_size: fields
            .optional("encoder_hidden_size")?
            .unwrap_or(standard.encoder_hidden_size),
        encoder_num_layers: fields
            .optional("encoder_num_layers")?
            .unwrap_or(standard.encoder_num_layers),
        encoder_dropout: fields.optional("encoder_dropout")?.unwrap_or(0.0),
        projected: true,
        peft,
    };
    Ok((Box::new(p), entrance()))
}

fn write_p(config: Value) -> Result<Written> {
    let p: PTuning = modl_core::from_json("p_tuning", config)?;
    let encoder = json!({
        "encoder_dropout": p.encoder_dropout,
        "encoder_hidden_size": p.encoder_hidden_size,
        "encoder_num_layers": p.encoder_num_layers,
        "encoder_reparameterization_type": p.encoder_reparameterization_type,
    });
    Ok((common_fields(p.num_virtual_tokens, &p.peft, encoder), p.peft))
}

fn read_prefix(fields: &mut Fields, peft: Provenance) -> Result<Read> {
    let (num_virtual_tokens, num_transformer_submodules, peft) = common(fields, peft)?;
    let start: Option<String> = fields.optional("init_weights")?;
    let prefix = PrefixTuning {
        num_virtual_tokens,
        num_transformer_submodules,
        prefix_projection: fields.optional("prefix_projection")?.unwrap_or(false),
        encoder_hidden_size: fields.optional("encoder_hidden_size")?.unwrap_or(512),
        projected: true,
        std: if start.as_deref() == Some("zero") { 0.0 } else { 1.0 },
        peft,
    };
    Ok((Box::new(prefix), prefixed(num_transformer_submodules)))
}

/// The only sites among `all` that a PEFT file of this module can stand for: files of prompts and
/// prefixes do not say where they stand.
pub(super) fn stands(module: &dyn ModuleConfig, all: &[Site]) -> Result<Option<Targets>> {
    match module.kind() {
        "prompt_tuning" | "p_tuning" => return Ok(Some(entrance())),
        "prefix_tuning" => {}
        _ => return Ok(None),
    }
    let prefix: PrefixTuning = modl_core::from_json("prefix_tuning", module.to_json()?)?;
    let stacks = all.iter().filter(|s| s.kind == SiteKind::Tokens).count();
    if stacks > 1 && prefix.num_transformer_submodules == 1 {
        return Err(Error::unsupported(
            "a PEFT folder of a prefix of an encoder with a decoder, where each has its own part",
            "PEFT gives the decoder's self-attention a prefix, num_transformer_submodules = 2; use \
             Modular::save_module",
        ));
    }
    Ok(Some(prefixed(prefix.num_transformer_submodules)))
}

fn write_prefix(config: Value) -> Result<Written> {
    let prefix: PrefixTuning = modl_core::from_json("prefix_tuning", config)?;
    let own = json!({
        "encoder_hidden_size": prefix.encoder_hidden_size,
        "init_weights": if prefix.std == 0.0 { json!("zero") } else { Value::Null },
        "prefix_projection": prefix.prefix_projection,
    });
    Ok((common_fields(prefix.num_virtual_tokens, &prefix.peft, own), prefix.peft))
}
