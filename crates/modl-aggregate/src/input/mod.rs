//! Combining prompts: modules that put vectors before the tokens
//! ([`Module::virtual_tokens`](modl_core::Module::virtual_tokens)). Survey §5.2.3.

mod attempt;
mod prompt_concat;
mod spot;

pub use attempt::{Attempt, AttemptForm};
pub use prompt_concat::PromptConcat;
pub use spot::{nearest_prompts, start_from_prompt};

use modl_core::{AggregatorConfig, Catalog, Context, Error, Module, Result, Tensor};

pub(crate) fn register(r: &mut Catalog<dyn AggregatorConfig>) -> Result<()> {
    r.register::<PromptConcat>("Prompts one behind the other", "Lester et al. 2021", "5.2")?;
    r.register::<Attempt>("Attention over prompts", "Asai et al. 2022, ATTEMPT", "5.2")
}

/// The vectors `[p, dim]` of a module that is a prompt.
fn tokens(kind: &str, name: &str, module: &dyn Module, cx: &Context) -> Result<Tensor> {
    module.virtual_tokens(cx)?.ok_or_else(|| {
        Error::unsupported(
            format!("`{kind}` of module `{name}`, a `{}`, which is no prompt", module.kind()),
            "combine prompts such as `prompt_tuning`, or choose another aggregator",
        )
    })
}
