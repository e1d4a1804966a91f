//! LoRA of the stacked weights of a mixture's experts: W' = W + s·B_e A_e for each expert e.
//!
//! As in PEFT's `target_parameters`, A `[experts · r, in]` holds the experts one below the other and
//! B `[out, r · experts]` has for each of the r columns those of all experts. The product is never
//! multiplied out in a forward pass: each expert's tokens go through its two thin matrices.

use modl_core::{
    Attachment, Context, Error, Host, Init, Module, Result, STACK_DOWN, STACK_UP, Scope, Signal,
    Tensor, Tensors,
};

use super::{A, B, Lora, LoraInit};

/// Where PEFT keeps the first of two parameters that it wraps one around the other.
const INNER: &str = "base_layer.";

/// LoRA at one site of experts.
#[derive(Debug, Clone)]
pub(super) struct ExpertChange(Vec<Stack>);

/// LoRA of one stacked weight.
#[derive(Debug, Clone)]
struct Stack {
    /// The weight's name in θ.
    weight: String,
    /// What A and B are called: the name of the weight is not in PEFT's keys.
    names: [String; 2],
    experts: i64,
    a: Tensor,
    b: Tensor,
    scale: f64,
}

impl ExpertChange {
    pub(super) fn build(lora: &Lora, at: &Attachment, scope: &mut Scope) -> Result<Self> {
        let path = |name: &str| format!("{}.{name}", at.site.path);
        let takes = |name: &str| {
            let path = path(name);
            let ends = |t: &String| path.strip_suffix(t.as_str());
            let mut heads = lora.target_parameters.iter().filter_map(ends);
            heads.any(|head| head.is_empty() || head.ends_with('.'))
        };
        let taken: Vec<(&str, &Tensor)> = at.theta.iter().filter(|(n, _)| takes(n)).collect();
        let Some(last) = taken.len().checked_sub(1) else {
            let said = lora.target_parameters.join(", ");
            return Err(Error::unknown("target parameter", &said, at.theta.names()));
        };
        let mut stacks = Vec::new();
        for (i, (name, w)) in taken.into_iter().enumerate() {
            let &[experts, out, input] = w.size().as_slice() else {
                return Err(Error::unsupported(
                    format!("LoRA of `{name}`, which is {w:?} and no stack of matrices,"),
                    "leave it out of `target_parameters`",
                ));
            };
            let (r, scale) = lora.rank_and_scale(&path(name))?;
            let names = [A, B].map(|end| format!("{}{end}", INNER.repeat(last - i)));
            let (init_a, init_b) = match lora.init {
                LoraInit::Gaussian => (Init::Normal(1.0 / r as f64), Init::Zeros),
                LoraInit::Random => (Init::Kaiming, Init::Kaiming),
                _ => (Init::Kaiming, Init::Zeros),
            };
            let a = scope.param(&names[0], &[experts * r, input], init_a)?;
            let b = scope.param(&names[1], &[out, r * experts], init_b)?;
            stacks.push(Stack { weight: name.to_owned(), names, experts, a, b, scale });
        }
        Ok(ExpertChange(stacks))
    }
}

impl Stack {
    /// s·A `[experts, r, in]` and B `[experts, out, r]`.
    fn factors(&self) -> Result<(Tensor, Tensor)> {
        let (input, out) = (self.a.len_of(1), self.b.len_of(0));
        let a = self.a.reshape(&[self.experts, -1, input])?.mul_scalar(self.scale)?;
        let b = self.b.reshape(&[out, -1, self.experts])?.permute(&[2, 0, 1])?;
        Ok((a, b))
    }
}

impl Module for ExpertChange {
    fn kind(&self) -> &'static str {
        "lora"
    }

    fn forward(&self, f: &Host, x: &Signal, cx: &Context) -> Result<Signal> {
        let kind = x.x.kind();
        let mut theta = f.theta().clone();
        for stack in &self.0 {
            let (down, up) = stack.factors()?;
            theta.set(format!("{}{STACK_DOWN}", stack.weight), down.to_kind(kind)?);
            theta.set(format!("{}{STACK_UP}", stack.weight), up.to_kind(kind)?);
        }
        f.call_with(&theta, x, cx)
    }

    fn compose(&self, theta: &Tensors) -> Result<Option<Tensors>> {
        let mut changed = theta.clone();
        for stack in &self.0 {
            let w = theta.need(&stack.weight)?;
            let (a, b) = stack.factors()?;
            // In the module's kind (f32), then rounded once.
            let sum = w.to_kind(a.kind())?.add(&b.bmm(&a)?)?;
            changed.set(stack.weight.clone(), sum.to_kind(w.kind())?);
        }
        Ok(Some(changed))
    }

    fn phi(&self) -> Tensors {
        let of = |s: &Stack| {
            let [a, b] = s.names.clone();
            [(a, s.a.clone()), (b, s.b.clone())]
        };
        self.0.iter().flat_map(of).collect()
    }

    fn with_phi(&self, phi: &Tensors) -> Result<Box<dyn Module>> {
        let new = |s: &Stack| {
            let [a, b] = [phi.need(&s.names[0])?.clone(), phi.need(&s.names[1])?.clone()];
            Ok(Stack { a, b, ..s.clone() })
        };
        Ok(Box::new(ExpertChange(self.0.iter().map(new).collect::<Result<_>>()?)))
    }

    fn signature(&self) -> String {
        let of = |s: &Stack| format!("{}{:?}{:?} {}", s.weight, s.a.size(), s.b.size(), s.scale);
        let all: Vec<String> = self.0.iter().map(of).collect();
        format!("lora_of_experts({})", all.join(", "))
    }
}
