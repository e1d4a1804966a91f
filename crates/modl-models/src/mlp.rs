//! The multilayer perceptron, for images as rows of numbers and for tables.
//!
//! hₙ = σ(Wₙ hₙ₋₁ + bₙ) for each hidden layer n, with h₋₁ the input (Rumelhart, Hinton, Williams 1986,
//! *Learning representations by back-propagating errors*). Objectives have heads of their own; with
//! `outputs` the network has an output layer, too, ℓ = W h + b without σ, which modules can stand on.
//!
//! | input | shape |
//! |---|---|
//! | `pixel_values` or `input_values` | `[batch, …]` floats, `inputs` of them for each row |
//!
//! | output | shape |
//! |---|---|
//! | `last_hidden_state` | `[batch, 1, width of the last hidden layer]` |
//! | `logits`, with `outputs` | `[batch, outputs]` |
//!
//! A row is a sequence of one token, so that modules and routers for tokens stand here as anywhere.

use std::path::Path;

use modl_core::{
    Activation, Backbone, Context, Device, Error, FreshBackbone, Init, Kind, Layers, ParamStore,
    Registry, Result, ResultExt, Scope, Seed, Select, Site, SiteKind, Tensor, Tensors, from_json,
    is_float,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::LoadOptions;
use crate::dropout::dropout;
use crate::folder::{Shapes, Weights, read_config};
use crate::place::{Pass, Place, Surveyor, theta_of};
use crate::settings::{check_dropout, check_layers, check_positive, refuse};

/// The settings of a multilayer perceptron.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MlpConfig {
    /// Numbers of a row: 784 for images of 28 × 28 pixels.
    pub inputs: i64,
    /// Widths of the hidden layers, one at least.
    pub hidden: Vec<i64>,
    /// Whether layers have biases; true where nothing is said.
    #[serde(default = "yes")]
    pub bias: bool,
    /// σ; `relu` where nothing is said.
    #[serde(default = "relu")]
    pub hidden_act: Activation,
    /// Dropout after each hidden layer, in [0, 1); 0 where nothing is said.
    #[serde(default)]
    pub hidden_dropout_prob: f64,
    /// The width of the output layer; none where nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outputs: Option<i64>,
}

fn yes() -> bool {
    true
}

fn relu() -> Activation {
    Activation::Relu
}

impl Default for MlpConfig {
    /// 784 inputs and two layers of 100.
    fn default() -> Self {
        MlpConfig {
            inputs: 784,
            hidden: vec![100, 100],
            bias: yes(),
            hidden_act: relu(),
            hidden_dropout_prob: 0.0,
            outputs: None,
        }
    }
}

/// The numbers of one weight that are not too many: 4 GB of floats.
const MOST: i64 = 1 << 30;

impl MlpConfig {
    /// Reads and checks the settings of a `config.json`.
    fn read(config: &Value) -> Result<Self> {
        let own = ["inputs", "hidden", "bias", "hidden_act", "hidden_dropout_prob", "outputs"];
        let all = config.as_object().into_iter().flatten();
        let table: Map<String, Value> = all
            .filter(|(key, _)| own.contains(&key.as_str()))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        let read: Self = from_json("config", table.into())?;
        read.check()?;
        match config.get("hidden_size").and_then(Value::as_i64) {
            Some(width) if width != read.width() => {
                let problem = format!("is {width}, but the last of `hidden` is {}", read.width());
                Err(Error::invalid("hidden_size", problem))
            }
            _ => Ok(read),
        }
    }

    fn check(&self) -> Result<()> {
        check_positive(&[("inputs", self.inputs)])?;
        check_layers("hidden", self.hidden.len())?;
        check_dropout(&[("hidden_dropout_prob", self.hidden_dropout_prob)])?;
        if self.hidden.is_empty() {
            return Err(Error::invalid("hidden", "is empty; give it a width at least: [100, 100]"));
        }
        for (n, (_, input, output)) in self.layers().into_iter().enumerate() {
            let key = if n < self.hidden.len() { "hidden" } else { "outputs" };
            check_positive(&[(key, output)])?;
            if input.checked_mul(output).is_none_or(|n| n > MOST) {
                return refuse(key, format!("{input} × {output}"), "are too many weights");
            }
        }
        Ok(())
    }

    /// Path, input and output width of each layer.
    fn layers(&self) -> Vec<(String, i64, i64)> {
        let inputs = std::iter::once(self.inputs).chain(self.hidden.iter().copied());
        let hidden = inputs.zip(self.hidden.iter().copied()).enumerate();
        let hidden = hidden.map(|(n, (input, output))| (path(n), input, output));
        let last = self.outputs.map(|outputs| (OUTPUT.to_owned(), self.width(), outputs));
        hidden.chain(last).collect()
    }

    /// The width of the last hidden layer.
    fn width(&self) -> i64 {
        self.hidden.last().copied().unwrap_or(self.inputs)
    }

    /// What stands in `config.json`.
    fn to_config(&self) -> Result<Value> {
        let mut config = modl_core::to_json("mlp", self)?;
        if let Some(table) = config.as_object_mut() {
            table.insert("model_type".into(), "mlp".into());
            table.insert("hidden_size".into(), self.width().into());
        }
        Ok(config)
    }
}

impl FreshBackbone for MlpConfig {
    fn kind(&self) -> &'static str {
        "mlp"
    }

    fn build(&self, seed: Seed, kind: Kind, device: Device) -> Result<Box<dyn Backbone>> {
        let options = LoadOptions { kind: Some(kind), device, ..LoadOptions::default() };
        Ok(Box::new(Mlp::new(self.clone(), seed, &options)?))
    }
}

/// Registers the backbones of this crate that can be drawn afresh.
///
/// # Errors
/// Where a name is taken.
pub fn register(registry: &mut Registry) -> Result<()> {
    registry.backbones.register::<MlpConfig>(
        "Multilayer perceptron",
        "Rumelhart, Hinton, Williams 1986",
        "",
    )
}

/// A multilayer perceptron: the site of layer n is `layers.N.linear`, that of the output layer
/// `output.linear`.
#[derive(Debug)]
pub struct Mlp {
    config: Value,
    settings: MlpConfig,
    params: ParamStore,
    sites: Vec<Site>,
    /// The hidden ones, then the output layer where there is one.
    layers: Vec<Place>,
}

/// The path of the output layer.
const OUTPUT: &str = "output.linear";

fn path(layer: usize) -> String {
    format!("layers.{layer}.linear")
}

impl Mlp {
    /// Weights and biases uniform in ±1⁄√(inputs of the layer), as PyTorch's `nn.Linear` starts.
    ///
    /// # Errors
    /// Where a setting is out of range.
    pub fn new(settings: MlpConfig, seed: Seed, options: &LoadOptions) -> Result<Self> {
        let settings = with_dropout(settings, options);
        settings.check()?;
        let kind = options.kind.unwrap_or(Kind::Float);
        let mut params = ParamStore::new();
        for (at, input, output) in settings.layers() {
            let mut scope = Scope::at(&mut params, &at, seed).on(kind, options.device);
            scope.param("weight", &[output, input], Init::Kaiming)?;
            if settings.bias {
                scope.param("bias", &[output], Init::Uniform(1.0 / (input as f64).sqrt()))?;
            }
        }
        params.train_only(&Select::none())?;
        Ok(Self::of(settings.to_config()?, settings, params))
    }

    /// Loads a folder that [`crate::save`] has written: `config.json` with `model_type` `mlp`, and
    /// `model.safetensors`.
    ///
    /// # Errors
    /// Where a file is missing or broken, a setting is out of range, or the tensors are not exactly
    /// those of the configuration.
    pub fn load(dir: impl AsRef<Path>, options: &LoadOptions) -> Result<Self> {
        let dir = dir.as_ref();
        Self::from_config(dir, read_config(dir)?, options)
    }

    pub(crate) fn from_config(dir: &Path, config: Value, options: &LoadOptions) -> Result<Self> {
        let settings = MlpConfig::read(&config).at(dir.to_string_lossy())?;
        let settings = with_dropout(settings, options);
        settings.check()?;
        let mut wanted = Shapes::new();
        for (at, input, output) in settings.layers() {
            wanted.insert(format!("{at}.weight"), vec![output, input]);
            if settings.bias {
                wanted.insert(format!("{at}.bias"), vec![output]);
            }
        }
        let weights = Weights::open(dir, |stored| Some(stored.to_owned()))?;
        let params = weights.load(&wanted, &format!("{}.weight", path(0)), options)?;
        Ok(Self::of(config, settings, params))
    }

    fn of(config: Value, settings: MlpConfig, params: ParamStore) -> Self {
        let mut to = Surveyor { params: &params, sites: Vec::new() };
        let layers = (settings.layers().iter())
            .map(|(at, input, output)| to.place(at, SiteKind::Linear, *input, *output))
            .collect();
        let sites = to.sites;
        Mlp { config, settings, params, sites, layers }
    }

    /// The settings, with the dropout that is in force.
    pub fn settings(&self) -> &MlpConfig {
        &self.settings
    }

    /// The rows `[batch, 1, inputs]`, in the kind and on the device of θ.
    fn read(&self, inputs: &Tensors) -> Result<Tensor> {
        let wanted = self.settings.inputs;
        let names = ["pixel_values", "input_values"];
        let Some((name, x)) = names.iter().find_map(|n| Some((*n, inputs.get(n)?))) else {
            let given: Vec<&str> = inputs.names().collect();
            let problem = format!(
                "are not among the inputs ({}): this backbone reads rows of {wanted} numbers",
                given.join(", ")
            );
            return Err(Error::invalid("pixel_values", problem));
        };
        let rows = if x.dim() > 1 { x.len_of(0) } else { 0 };
        if rows < 1 || x.numel() as i64 != rows * wanted || !is_float(x.kind()) {
            let problem = format!("{x:?}; wanted are floats, {wanted} for each row of the batch");
            return Err(Error::invalid(name, problem));
        }
        let first = self.layers.first().and_then(|l| l.theta.get("weight"));
        let x = x.reshape(&[rows, 1, wanted])?;
        match first {
            Some(w) => x.to_kind(w.kind())?.to_device(w.device()),
            None => Ok(x),
        }
    }
}

fn with_dropout(settings: MlpConfig, options: &LoadOptions) -> MlpConfig {
    let hidden_dropout_prob = options.dropout.unwrap_or(settings.hidden_dropout_prob);
    MlpConfig { hidden_dropout_prob, ..settings }
}

impl Backbone for Mlp {
    fn sites(&self) -> &[Site] {
        &self.sites
    }

    fn params(&self) -> &ParamStore {
        &self.params
    }

    fn theta(&self, site: &Site) -> Result<Tensors> {
        theta_of(&self.sites, &self.params, site)
    }

    fn config(&self) -> &Value {
        &self.config
    }

    fn forward(&self, inputs: &Tensors, layers: &Layers, cx: &Context) -> Result<Tensors> {
        let mut x = self.read(inputs)?; // [batch, 1, inputs]
        let modular = self.layers.iter().any(|l| layers.at(&l.site).is_some());
        // Every token is real, for routers that ask.
        let masked = modular && cx.find("mask").is_none();
        let own = match masked {
            true => {
                let mask = Tensor::ones(&[x.len_of(0), 1], x.kind(), x.device())?;
                Some(cx.clone().with_feature("mask", mask))
            }
            false => None,
        };
        if !modular {
            // As matrices, which libtorch multiplies without views around each product.
            x = x.squeeze(1)?;
        }
        let pass = Pass { layers, cx: own.as_ref().unwrap_or(cx) };
        for layer in self.layers.iter().take(self.settings.hidden.len()) {
            x = layer.linear_then(&x, pass, self.settings.hidden_act)?;
            x = dropout(x, pass.dropout(&layer.site.path, self.settings.hidden_dropout_prob))?;
        }
        let rows = x.len_of(0);
        let logits = match self.layers.get(self.settings.hidden.len()) {
            Some(output) => Some(output.linear(&x, pass)?.reshape(&[rows, -1])?),
            None => None,
        };
        let x = if modular { x } else { x.unsqueeze(1)? };
        let mut outputs = Tensors::new().with("last_hidden_state", x);
        if let Some(logits) = logits {
            outputs.set("logits", logits);
        }
        Ok(outputs)
    }
}
