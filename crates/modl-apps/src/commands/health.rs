//! What can be told from tensors alone: size, rank, and whether something is wrong with them.

use anyhow::Result;
use modl_aggregate::adapters::effective_rank;
use modl_core::checkpoint::Checkpoint;
use modl_core::{Device, Kind, Tensor, is_float};

use crate::report::Table;

/// The endings of the two factors of a low-rank change.
const FACTORS: [(&str, &str); 2] =
    [("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")];

/// One table of all tensors, and a line for each that looks suspicious.
pub(crate) fn report(file: &Checkpoint) -> Result<(Table, Vec<String>)> {
    let mut suspicious = Vec::new();
    let mut table = Table::new(["tensor", "kind", "shape", "norm", "largest"]);
    for name in file.names() {
        let (shape, kind) = file.info(&name)?;
        if !is_float(kind) {
            continue;
        }
        let t = file.tensor(&name, Device::Cpu)?;
        let wide = t.to_kind(Kind::Double)?;
        let norm = wide.square()?.sum()?.item()?.sqrt();
        let empty = t.numel() == 0;
        let largest = if empty { 0.0 } else { wide.abs()?.largest()?.item()? };
        if !norm.is_finite() {
            let numbers = wide.to_vec::<f64>()?;
            let nan = numbers.iter().filter(|v| v.is_nan()).count();
            let infinite = numbers.iter().filter(|v| v.is_infinite()).count();
            suspicious.push(format!(
                "{name}: {nan} NaN and {infinite} infinite of {} values",
                numbers.len()
            ));
        } else if norm == 0.0 {
            suspicious.push(format!("{name}: all zero"));
        }
        table.row([
            name,
            format!("{kind:?}").to_lowercase(),
            format!("{shape:?}"),
            format!("{norm:.4}"),
            format!("{largest:.4}"),
        ]);
    }
    Ok((table, suspicious))
}

/// Rank, norm and effective rank of every pair of low-rank factors, without the scale α⁄r.
pub(crate) fn low_rank(file: &Checkpoint) -> Result<Option<Table>> {
    let mut table = Table::new(["site", "rank", "norm of B A", "effective rank"]);
    let mut found = false;
    for name in file.names() {
        for (a, b) in FACTORS {
            let Some(site) = name.strip_suffix(a) else { continue };
            let other = format!("{site}{b}");
            if file.info(&other).is_err() {
                continue;
            }
            let (down, up) = (file.tensor(&name, Device::Cpu)?, file.tensor(&other, Device::Cpu)?);
            let flat = |t: Tensor| -> Result<Tensor> {
                Ok(t.to_kind(Kind::Double)?.reshape(&[t.len_of(0), -1])?)
            };
            let (down, up) = (flat(down)?, flat(up)?);
            let product = up.sum()?.add(&down.sum()?)?;
            if up.len_of(1) != down.len_of(0) || !product.item()?.is_finite() {
                continue;
            }
            let values = singular_values(&down, &up)?;
            let norm = values.iter().map(|s| s * s).sum::<f64>().sqrt();
            table.row([
                site.trim_end_matches('.').to_owned(),
                down.len_of(0).to_string(),
                format!("{norm:.4}"),
                format!("{:.2}", effective_rank(&values)),
            ]);
            found = true;
        }
    }
    Ok(found.then_some(table))
}

/// The singular values of up · down `[out, rank] · [rank, in]`, from rank × rank matrices: with
/// Bᵀ B = V D Vᵀ they are the roots of the eigenvalues of (√D Vᵀ) A Aᵀ (V √D).
fn singular_values(down: &Tensor, up: &Tensor) -> Result<Vec<f64>> {
    let (_, d, vt) = up.t()?.matmul(up)?.svd()?;
    let root = vt.mul(&d.clamp(0.0, f64::INFINITY)?.sqrt()?.unsqueeze(1)?)?;
    let inner = root.matmul(&down.matmul(&down.t()?)?)?.matmul(&root.t()?)?;
    let (_, squares, _) = inner.svd()?;
    Ok(squares.to_vec::<f64>()?.into_iter().map(|v| v.max(0.0).sqrt()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn diagonal(values: &[f64], rows: i64, columns: i64) -> Tensor {
        let mut all = vec![0.0; (rows * columns) as usize];
        for (i, v) in values.iter().enumerate() {
            all[i * columns as usize + i] = *v;
        }
        Tensor::from_slice(&all, &[rows, columns], Device::Cpu).unwrap()
    }

    #[test]
    fn singular_values_of_a_product_come_from_small_matrices() {
        let found = singular_values(&diagonal(&[1.0, 2.0], 2, 5), &diagonal(&[3.0, 4.0], 7, 2));
        let found = found.unwrap();
        assert!((found[0] - 8.0).abs() < 1e-9 && (found[1] - 3.0).abs() < 1e-9, "{found:?}");
    }
}
