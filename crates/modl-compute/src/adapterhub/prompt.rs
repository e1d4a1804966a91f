//! `PromptTuningConfig`: prompt tuning. Other than in PEFT, the prompt stands before what the
//! embeddings give, behind positions and normalisation.

use modl_core::{Error, Result};
use serde_json::{Map, Value, json};

use super::{Fields, Header, Method, Read, Standing};
use crate::PromptTuning;
use crate::input::entrance;
use crate::peft::object;

pub(super) const PROMPT_TUNING: Method = Method {
    architecture: Some("prompt_tuning"),
    asked: |_| true,
    kind: "prompt_tuning",
    read,
    write,
    key: |p| {
        format!("{}prompt_tuning.prompt_tunings.{}.prompt_embedding.weight", p.model, p.adapter)
    },
    unpack: None,
    pack: None,
};

fn read(fields: &mut Fields, _: &Header) -> Result<Read> {
    // How the prompt started; the file has what became of it.
    for name in ["prompt_init", "prompt_init_text", "random_uniform_scale", "init_weights_seed"] {
        fields.ignore(name);
    }
    fields.refuse_unless("combine", "prefix")?;
    let prompt = PromptTuning {
        num_virtual_tokens: fields.required("prompt_length")?,
        after_embeddings: true,
        ..PromptTuning::default()
    };
    Ok((Box::new(prompt), entrance()))
}

fn write(config: Value, _: &Standing) -> Result<Map<String, Value>> {
    let prompt: PromptTuning = modl_core::from_json("prompt_tuning", config)?;
    if !prompt.after_embeddings || prompt.num_transformer_submodules != 1 {
        return Err(Error::unsupported(
            "a prompt before the embeddings in an AdapterHub folder",
            "AdapterHub puts it behind positions and normalisation (`after_embeddings`); keep \
             PEFT's format",
        ));
    }
    Ok(object(json!({
        "architecture": "prompt_tuning",
        "combine": "prefix",
        "init_weights_seed": null,
        "prompt_init": "random_uniform",
        "prompt_init_text": null,
        "prompt_length": prompt.num_virtual_tokens,
    })))
}
