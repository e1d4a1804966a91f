//! What PEFT keeps beside an adapter in the same folder: whole modules (`modules_to_save`), rows of
//! the embeddings (`trainable_token_indices`) and LoRA of the stacked weights of experts
//! (`target_parameters`). Here the adapter and they are the parts of a [`Union`].

use modl_core::{Backbone, Error, ModuleConfig, Names, Result, Site, Targets};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::fields::Fields;
use super::{PREFIX, PeftType, Provenance, Read, Saved};
use crate::function::of_part;
use crate::sparse::ROWS;
use crate::{Form, Full, Lora, Nested, Part, TrainableTokens, Union};

/// `trainable_token_indices`: of the table of words, or of tables by name.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Indices {
    Words(Vec<i64>),
    Named(Map<String, Value>),
}

/// The fields that make an adapter a union.
#[derive(Debug)]
pub(super) struct Beside {
    tokens: Option<Indices>,
    /// `target_parameters`.
    stacks: Vec<String>,
    /// Whether there is no adapter besides them.
    alone: bool,
}

impl Beside {
    pub(super) fn read(fields: &mut Fields) -> Result<Self> {
        let tokens = fields.optional("trainable_token_indices")?;
        let stacks: Vec<String> = fields.optional("target_parameters")?.unwrap_or_default();
        let modules: Option<Value> = fields.optional("target_modules")?;
        let none = modules.as_ref().is_none_or(|m| *m == json!([]));
        let alone = none && !stacks.is_empty();
        if alone {
            fields.give("target_modules", json!([]));
        } else if let Some(modules) = modules {
            fields.give("target_modules", modules);
        }
        Ok(Beside { tokens, stacks, alone })
    }

    /// The part with the stacked weights, for the settings of the adapter.
    fn experts(&self, adapter: &dyn ModuleConfig) -> Result<Part> {
        if adapter.kind() != "lora" {
            return Err(Error::unsupported(
                format!("`target_parameters` of the kind `{}`", adapter.kind()),
                "it works with plain LoRA; merge the adapter where it was made",
            ));
        }
        let lora: Lora = modl_core::from_json("lora", adapter.to_json()?)?;
        let mut sites: Vec<String> = Vec::new();
        for name in &self.stacks {
            let site = name.rsplit_once('.').map_or("", |(site, _)| site);
            if !sites.iter().any(|s| s == site) {
                sites.push(site.to_owned());
            }
        }
        let targets = match sites.iter().any(String::is_empty) {
            true => Targets::pattern("all-experts"),
            false => Targets::names(sites),
        };
        Ok(Part::new(targets, Lora { target_parameters: self.stacks.clone(), ..lora }))
    }

    /// The adapter with what stands beside it.
    pub(super) fn join(self, saved: Option<&Saved>, (module, targets): Read) -> Result<Read> {
        let mut beside: Vec<Part> = Vec::new();
        if !self.stacks.is_empty() {
            beside.push(self.experts(module.as_ref())?);
        }
        if let Some(saved) = saved {
            beside.push(Part::new(Targets::new(saved.sites()), Full { form: Form::Copy }));
        }
        match self.tokens {
            None => {}
            Some(Indices::Words(ids)) if ids.is_empty() => {}
            Some(Indices::Words(ids)) => {
                let words = Targets::pattern("all-embedding");
                beside.push(Part::new(words, TrainableTokens::new(ids)));
            }
            Some(Indices::Named(tables)) => {
                for (name, ids) in tables {
                    let ids: Vec<i64> = modl_core::from_json("trainable_token_indices", ids)?;
                    beside.push(Part::new(Targets::names([name]), TrainableTokens::new(ids)));
                }
            }
        }
        if beside.is_empty() {
            return Ok((module, targets));
        }
        let mut parts = beside;
        if !self.alone {
            parts.insert(0, Part { targets, config: Nested::from_box(module) });
        }
        let union = Union { parts };
        let targets = union.usual_targets();
        Ok((Box::new(union), targets))
    }
}

impl Saved {
    pub(super) fn read(fields: &mut Fields) -> Result<Option<Self>> {
        let modules: Vec<String> = fields.optional("modules_to_save")?.unwrap_or_default();
        if modules.is_empty() {
            return Ok(None);
        }
        let mut saved = Saved { modules, exclude: None };
        if fields.says("target_modules") {
            saved.exclude = fields.optional("exclude_modules")?;
            fields.give("exclude_modules", json!(saved.exclusion()));
        }
        Ok(Some(saved))
    }

    /// The modules that end with one of the names, and what is below them.
    fn sites(&self) -> Names {
        let names: Vec<String> = self.modules.iter().map(|m| regex::escape(m)).collect();
        Names::Pattern(format!(r".*(?:{})(?:\..*)?", names.join("|")))
    }

    /// Where the adapter does not stand.
    fn exclusion(&self) -> Names {
        let (Names::Pattern(own), exclude) = (self.sites(), self.exclude.as_ref()) else {
            return self.sites();
        };
        Names::Pattern(match exclude {
            None => own,
            Some(Names::Pattern(p)) => format!("(?:{p})|{own}"),
            Some(Names::List(list)) => {
                let names: Vec<String> = list.iter().map(|n| regex::escape(n)).collect();
                format!(r"(?:.*\.)?(?:{})|{own}", names.join("|"))
            }
            Some(any) => return Names::Any([any.clone(), self.sites()].map(Targets::new).to_vec()),
        })
    }
}

/// What a part of an attached module is to PEFT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Adapter,
    Experts,
    Saved,
    Tokens,
}

impl Role {
    /// That of a method as it is configured.
    fn of(config: &dyn ModuleConfig) -> Result<Self> {
        Ok(match config.kind() {
            "full" if config.to_json()?["form"] == json!(Form::Copy) => Role::Saved,
            "trainable_tokens" => Role::Tokens,
            "lora" if config.to_json()?.get("target_parameters").is_some() => Role::Experts,
            _ => Role::Adapter,
        })
    }
}

/// How the parameters of an attached module lie in a folder.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) of: &'static PeftType,
    /// Of a union's parts; none where the module is no union.
    roles: Option<Vec<Role>>,
}

impl Layout {
    /// That of `module`, whose adapter is of the type `of`.
    pub(super) fn new(of: &'static PeftType, module: &dyn ModuleConfig) -> Result<Self> {
        let union = as_union(module)?;
        let roles = |u: Union| u.parts.iter().map(|p| Role::of(&*p.config)).collect();
        Ok(Layout { of, roles: union.map(roles).transpose()? })
    }

    /// The key in the file of a parameter, and whether it is the adapter's own.
    pub(super) fn key(&self, param: &str) -> (String, bool) {
        let roles = self.roles.iter().flatten().enumerate();
        let part = roles.filter_map(|(i, role)| Some((*role, of_part(i, param)?))).next();
        let (role, param) = part.unwrap_or_else(|| (Role::Adapter, param.to_owned()));
        match (role, param.strip_suffix(ROWS)) {
            (Role::Tokens, Some(table)) => (format!("{PREFIX}{table}token_adapter.{ROWS}"), false),
            (Role::Adapter | Role::Experts, _) => ((self.of.key)(&param), true),
            _ => (format!("{PREFIX}{param}"), false),
        }
    }
}

fn as_union(module: &dyn ModuleConfig) -> Result<Option<Union>> {
    let is_one = module.kind() == "union";
    is_one.then(|| modl_core::from_json("union", module.to_json()?)).transpose()
}

/// The sites that a module stands at: for a union those of its parts.
pub(super) fn narrow(
    module: &dyn ModuleConfig,
    targets: Targets,
    sites: &[Site],
) -> Result<Targets> {
    as_union(module)?.map_or(Ok(targets), |union| union.targets(sites))
}

/// Refuses trained rows of a table that is another layer's, too: PEFT changes both.
pub(super) fn refuse_tied_tokens(
    module: &dyn ModuleConfig,
    targets: &Targets,
    backbone: &dyn Backbone,
) -> Result<()> {
    let mut of_tokens = Vec::new();
    if module.kind() == "trainable_tokens" {
        of_tokens.push(targets.clone());
    }
    for part in as_union(module)?.into_iter().flat_map(|u| u.parts) {
        if Role::of(&*part.config)? == Role::Tokens {
            of_tokens.push(part.targets);
        }
    }
    for targets in of_tokens {
        for table in targets.select(backbone.sites())? {
            let theta = backbone.theta(table)?;
            for other in backbone.sites().iter().filter(|s| s.index != table.index) {
                let own = backbone.theta(other)?;
                if own.iter().any(|(_, t)| theta.iter().any(|(_, w)| w.shares(t))) {
                    return Err(Error::unsupported(
                        format!(
                            "trained tokens of `{}`, which `{}` shares",
                            table.path, other.path
                        ),
                        "merge the adapter where it was made, or untie the backbone",
                    ));
                }
            }
        }
    }
    Ok(())
}

/// An attached module as PEFT has it.
pub(super) struct Taken {
    /// The adapter's kind, configuration and targets.
    pub(super) kind: String,
    pub(super) config: Value,
    /// None where there are only the stacked weights of experts.
    pub(super) targets: Option<Targets>,
    /// The parts beside it with their roles.
    beside: Vec<(Role, Part)>,
}

impl Taken {
    /// Takes a module apart.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where it is a union that PEFT cannot have.
    pub(super) fn apart(module: &dyn ModuleConfig, targets: &Targets) -> Result<Self> {
        let (mut adapter, mut beside) = (None, Vec::new());
        let Some(union) = as_union(module)? else {
            let (kind, config) = (module.kind().to_owned(), module.to_json()?);
            return Ok(Taken { kind, config, targets: Some(targets.clone()), beside });
        };
        for part in union.parts {
            match (Role::of(&*part.config)?, &adapter) {
                (Role::Adapter, None) => adapter = Some(part),
                (Role::Adapter, Some(_)) => {
                    return Err(Error::unsupported(
                        "a union of several adapters in one PEFT folder",
                        "attach and save each by itself, or use Modular::save_module",
                    ));
                }
                (role, _) => beside.push((role, part)),
            }
        }
        let first = beside.iter().find(|(role, _)| *role == Role::Experts).map(|(_, part)| part);
        let (targets, config) = match (&adapter, first) {
            (Some(part), _) => (Some(part.targets.clone()), &part.config),
            (None, Some(experts)) => (None, &experts.config),
            (None, None) => {
                return Err(Error::unsupported(
                    "a union without an adapter in a PEFT folder",
                    "add one, or use Modular::save_module",
                ));
            }
        };
        let (kind, config) = (config.kind().to_owned(), config.to_json()?);
        Ok(Taken { kind, config, targets, beside })
    }

    /// Puts what stands beside the adapter into its fields.
    ///
    /// # Errors
    /// Where the adapter's type has no field for it.
    pub(super) fn write(
        &self,
        saved: Option<&Saved>,
        sites: &[Site],
        fields: &mut Map<String, Value>,
    ) -> Result<()> {
        let (mut modules, mut stacks) = (Vec::new(), Vec::new());
        let mut tables = Map::new();
        for (role, Part { targets, config }) in &self.beside {
            if *role == Role::Saved {
                match saved.filter(|s| targets.names == s.sites()) {
                    Some(saved) => modules.extend(saved.modules.clone()),
                    None => modules.extend(names(targets, sites)?),
                }
                continue;
            }
            if *role == Role::Experts {
                stacks.extend(self.stacks(&config.to_json()?)?);
                continue;
            }
            let ids = config.to_json()?["token_indices"].clone();
            let words = Names::Pattern("all-embedding".into());
            if targets.names == words && self.beside.iter().filter(|(r, _)| r == role).count() == 1
            {
                set(fields, "trainable_token_indices", ids)?;
                continue;
            }
            tables.extend(names(targets, sites)?.into_iter().map(|name| (name, ids.clone())));
        }
        if !modules.is_empty() {
            set(fields, "modules_to_save", json!(modules))?;
        }
        if !stacks.is_empty() {
            set(fields, "target_parameters", json!(stacks))?;
        }
        if !tables.is_empty() {
            set(fields, "trainable_token_indices", Value::Object(tables))?;
        }
        // The file says it by `modules_to_save`.
        if let Some(saved) = saved
            && self.targets.as_ref().is_some_and(|t| t.exclude == Some(saved.exclusion()))
            && fields.contains_key("exclude_modules")
        {
            fields.insert("exclude_modules".to_owned(), json!(saved.exclude));
        }
        Ok(())
    }
}

impl Taken {
    /// `target_parameters` of a LoRA of experts, which has the adapter's other settings in PEFT.
    fn stacks(&self, config: &Value) -> Result<Vec<String>> {
        let read = |config: &Value| -> Result<Lora> {
            let lora: Lora = modl_core::from_json("lora", config.clone())?;
            Ok(Lora { peft: Provenance::default(), ..lora })
        };
        let of_experts = read(config)?;
        let names = of_experts.target_parameters.clone();
        let alike = match self.kind.as_str() {
            "lora" => {
                read(&self.config).map(|own| Lora { target_parameters: names.clone(), ..own })
            }
            _ => Ok(Lora::default()),
        };
        if alike? == of_experts {
            return Ok(names);
        }
        Err(Error::unsupported(
            "LoRA of experts with other settings than the adapter beside it in a PEFT folder",
            "use `rank_pattern` and `alpha_pattern` in both, or Modular::save_module",
        ))
    }
}

/// What targets say as names: their own, or else the paths of the sites that they take.
fn names(targets: &Targets, sites: &[Site]) -> Result<Vec<String>> {
    match &targets.names {
        Names::List(list) if *targets == Targets::new(targets.names.clone()) => Ok(list.clone()),
        _ => Ok(targets.select(sites)?.into_iter().map(|s| s.path.clone()).collect()),
    }
}

/// Sets a field that PEFT's configuration has.
fn set(fields: &mut Map<String, Value>, name: &str, value: Value) -> Result<()> {
    match fields.get_mut(name) {
        Some(field) => *field = value,
        None => {
            let of = fields.get("peft_type").and_then(Value::as_str).unwrap_or_default();
            return Err(Error::unsupported(
                format!("`{name}` beside {of}, for which PEFT has no field,"),
                "keep the module in modl's own file, by Modular::save_module",
            ));
        }
    }
    Ok(())
}
