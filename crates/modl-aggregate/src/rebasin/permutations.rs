//! Which units can be exchanged, and a model with its units in other orders.

use modl_core::{Device, Error, Result, Tensor, Tensors};

/// Which axes of which tensors go by one order: for each layer of units that can be exchanged.
#[derive(Debug, Clone, Default)]
pub struct Permutations(Vec<Layer>);

/// The axes of one layer's units.
#[derive(Debug, Clone)]
pub struct Layer {
    /// What it is called, for errors.
    pub name: String,
    /// Tensors and the axis that the units are on.
    pub axes: Vec<(String, usize)>,
}

/// A layer's axes in a model, and how many units it has.
pub(super) type Fitted = (Vec<(String, i64)>, usize);

impl Permutations {
    /// Layers as they are given.
    ///
    /// # Errors
    /// Where a tensor is in one layer twice: units that it makes of themselves (a residual stream) are
    /// no assignment.
    pub fn new(layers: Vec<Layer>) -> Result<Self> {
        for layer in &layers {
            for (n, (tensor, _)) in layer.axes.iter().enumerate() {
                if layer.axes.iter().take(n).any(|(t, _)| t == tensor) {
                    let problem = format!("has `{tensor}` on two axes");
                    return Err(Error::invalid(format!("layer `{}`", layer.name), problem));
                }
            }
        }
        Ok(Permutations(layers))
    }

    /// Linear layers one after the other, by their names: `L.weight` `[out, in]` and `L.bias`. All
    /// outputs but the last layer's can be exchanged.
    pub fn mlp(layers: &[&str]) -> Self {
        let one = |pair: &[&str]| match pair {
            [from, to] => Some(Self::hidden(from, &[from], to)),
            _ => None,
        };
        Permutations(layers.windows(2).filter_map(one).collect())
    }

    /// The feed-forward networks of a transformer, by the names of the layers that make the hidden
    /// units (one, or a gate and another) and of the one that reads them.
    pub fn feed_forward(blocks: &[(&[&str], &str)]) -> Self {
        let one = |(makers, reader): &(&[&str], &str)| Self::hidden(reader, makers, reader);
        Permutations(blocks.iter().map(one).collect())
    }

    fn hidden(name: &str, makers: &[&str], reader: &str) -> Layer {
        let made =
            makers.iter().flat_map(|m| [(format!("{m}.weight"), 0), (format!("{m}.bias"), 0)]);
        let axes = made.chain([(format!("{reader}.weight"), 1)]).collect();
        Layer { name: name.to_owned(), axes }
    }

    /// The layers.
    pub fn layers(&self) -> &[Layer] {
        &self.0
    }

    /// The layers' axes in a model, without tensors that it does not have (biases), and how many units
    /// each layer has.
    pub(super) fn fitted(&self, model: &Tensors) -> Result<Vec<Fitted>> {
        let one = |layer: &Layer| {
            let mut axes = Vec::new();
            let mut units = None;
            for (tensor, axis) in &layer.axes {
                let Some(t) = model.get(tensor) else {
                    if tensor.ends_with(".bias") {
                        continue;
                    }
                    return Err(Error::unknown("tensor", tensor, model.names()));
                };
                let found = t.size().get(*axis).copied();
                let of = format!("layer `{}`", layer.name);
                match (units, found) {
                    (_, None) => {
                        let problem = format!("`{tensor}` {:?} has no axis {axis}", t.size());
                        return Err(Error::invalid(of, problem));
                    }
                    (Some(n), Some(m)) if n != m => {
                        return Err(Error::invalid(
                            of,
                            format!("`{tensor}` has {m} units, not {n}"),
                        ));
                    }
                    _ => units = found,
                }
                axes.push((tensor.clone(), *axis as i64));
            }
            Ok((axes, units.unwrap_or(0) as usize))
        };
        self.0.iter().map(one).collect()
    }
}

/// A model with its units in other orders: unit `order[i]` of each layer comes to place i.
///
/// # Errors
/// Where an order is not one of the layer's units.
pub fn permuted(layers: &Permutations, model: &Tensors, orders: &[Vec<usize>]) -> Result<Tensors> {
    let fitted = layers.fitted(model)?;
    if fitted.len() != orders.len() {
        let problem = format!("{} for {} layers", orders.len(), fitted.len());
        return Err(Error::invalid("orders", problem));
    }
    let mut moved = model.clone();
    for ((axes, units), order) in fitted.iter().zip(orders) {
        let mut sorted = order.clone();
        sorted.sort_unstable();
        if !sorted.into_iter().eq(0..*units) {
            return Err(Error::invalid("orders", format!("one is none of 0 to {units}")));
        }
        reorder(axes, order, &mut moved)?;
    }
    Ok(moved)
}

pub(super) fn reorder(axes: &[(String, i64)], order: &[usize], model: &mut Tensors) -> Result<()> {
    for (name, axis) in axes {
        let t = model.need(name)?;
        let t = t.index_select(*axis, &index(order, t.device())?)?;
        model.set(name.clone(), t);
    }
    Ok(())
}

pub(super) fn index(places: &[usize], device: Device) -> Result<Tensor> {
    let places: Vec<i64> = places.iter().map(|i| *i as i64).collect();
    Tensor::from_slice(&places, &[places.len() as i64], device)
}
