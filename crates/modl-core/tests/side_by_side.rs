//! Branches of a computation side by side against the same computation one after the other.
#![allow(clippy::unwrap_used, clippy::panic)]

use modl_core::{
    Branch, Device, Error, Init, Kind, Result, Seed, Tensor, Work, no_grad, set_threads,
    side_by_side, suits_side_by_side,
};

const ROWS: [i64; 5] = [3, 1, 4, 1, 5];

fn leaf(name: &str, shape: &[i64], trained: bool) -> Tensor {
    let t = Init::Normal(1.0).tensor(shape, Seed(3).child(name), Kind::Double, Device::Cpu);
    let t = t.unwrap();
    t.set_requires_grad(trained).unwrap();
    t
}

/// tanh(x W) · s, where s may be the same tensor in all branches.
fn f(x: &Tensor, w: &Tensor, s: &Tensor) -> Result<Tensor> {
    x.matmul(w)?.tanh()?.mul(s)
}

fn branch(rows: i64, w: &Tensor, s: &Tensor) -> Branch<'static> {
    let f = |own: Vec<Tensor>| -> Result<Work<'static>> {
        let [w, s] = <[Tensor; 2]>::try_from(own).unwrap();
        Ok(Box::new(move |x| f(&x, &w, &s)))
    };
    Branch { rows, phi: vec![w.clone(), s.clone()], f: Box::new(f) }
}

/// x, a frozen and four trained matrices, and a scale that all share.
fn world(of_x: bool) -> (Tensor, Vec<Tensor>, Tensor) {
    set_threads(3);
    let x = leaf("x", &[ROWS.iter().sum(), 4], of_x);
    let ws = (0..5).map(|n| leaf(&format!("w{n}"), &[4, 2], n != 2)).collect();
    (x, ws, leaf("s", &[2], true))
}

fn both(x: &Tensor, ws: &[Tensor], s: &Tensor) -> Result<[Tensor; 2]> {
    let fast = side_by_side(x, ROWS.iter().zip(ws).map(|(n, w)| branch(*n, w, s)).collect())?;
    let parts = x.split(&ROWS, 0)?;
    let plain: Vec<Tensor> =
        parts.iter().zip(ws).map(|(x, w)| f(x, w, s)).collect::<Result<_>>()?;
    Ok([fast, Tensor::cat(&plain, 0)?])
}

fn gradients(y: &Tensor, of: &[&Tensor]) -> Result<Vec<Option<Tensor>>> {
    let probe = leaf("probe", &y.size(), false);
    y.mul(&probe)?.sum()?.gradients(of, false)
}

#[test]
fn values_and_gradients_are_those_of_one_after_the_other() -> Result<()> {
    for of_x in [true, false] {
        let (x, ws, s) = world(of_x);
        let [fast, plain] = both(&x, &ws, &s)?;
        assert!(fast.all_close(&plain, 1e-12, 1e-12)?);
        let trained: Vec<&Tensor> =
            ws.iter().chain([&s, &x]).filter(|t| t.requires_grad()).collect();
        assert_eq!(trained.len(), 5 + usize::from(of_x));
        for (a, b) in gradients(&fast, &trained)?.iter().zip(gradients(&plain, &trained)?) {
            assert!(a.as_ref().unwrap().all_close(&b.unwrap(), 1e-12, 1e-12)?);
        }
    }
    Ok(())
}

/// Tensors that are results themselves hand gradients on to what they were made of.
#[test]
fn gradients_go_on_behind_a_parameter_that_was_computed() -> Result<()> {
    let (x, ws, s) = world(true);
    let made = || -> Result<[Tensor; 2]> {
        let made: Vec<Tensor> = ws.iter().map(|w| w.mul(w)).collect::<Result<_>>()?;
        both(&x.mul_scalar(2.0)?, &made, &s)
    };
    let ([fast, _], [_, plain]) = (made()?, made()?);
    let wanted: Vec<&Tensor> = [&x, &ws[0], &ws[4]].into();
    for (a, b) in gradients(&fast, &wanted)?.iter().zip(gradients(&plain, &wanted)?) {
        assert!(a.as_ref().unwrap().all_close(&b.unwrap(), 1e-12, 1e-12)?);
    }
    Ok(())
}

#[test]
fn only_what_is_asked_for_is_computed_and_unused_parts_get_zeros() -> Result<()> {
    let (x, ws, s) = world(true);
    // A branch that does not look at its x.
    let blind = |own: Vec<Tensor>| -> Result<Work<'static>> {
        Ok(Box::new(move |x| own[0].narrow(0, 0, 1)?.expand(&[x.len_of(0), 2])))
    };
    let mut branches: Vec<Branch> = ROWS.iter().zip(&ws).map(|(n, w)| branch(*n, w, &s)).collect();
    branches[1] = Branch { rows: 1, phi: vec![ws[1].clone()], f: Box::new(blind) };
    let y = side_by_side(&x, branches)?;
    let found = gradients(&y, &[&x, &ws[0]])?;
    let dx = found[0].as_ref().unwrap();
    assert_eq!(dx.narrow(0, 3, 1)?.abs()?.sum()?.item()?, 0.0);
    assert!(dx.narrow(0, 0, 3)?.abs()?.sum()?.item()? > 0.0);
    assert!(found[1].is_some());
    Ok(())
}

#[test]
fn nothing_is_recorded_where_nobody_wants_gradients() -> Result<()> {
    let (x, ws, s) = world(true);
    let [fast, plain] = no_grad(|| both(&x, &ws, &s))?;
    assert!(!fast.requires_grad() && fast.all_close(&plain, 1e-12, 1e-12)?);
    let (x, s) = (x.detach()?, s.detach()?);
    let ws: Vec<Tensor> = ws.iter().map(Tensor::detach).collect::<Result<_>>()?;
    assert!(!both(&x, &ws, &s)?[0].requires_grad());
    Ok(())
}

#[test]
fn a_gradient_of_a_gradient_and_a_second_backward_pass_are_refused_in_words() -> Result<()> {
    let (x, ws, s) = world(true);
    let [y, _] = both(&x, &ws, &s)?;
    let loss = y.mul(&y)?.sum()?;
    let e = loss.gradients(&[&x], true).unwrap_err().to_string();
    assert!(e.contains("no gradient of a gradient"), "{e}");
    let [y, _] = both(&x, &ws, &s)?;
    let loss = y.sum()?;
    loss.gradients(&[&x], false)?;
    assert!(loss.gradients(&[&x], false).is_err());
    Ok(())
}

#[test]
fn what_goes_wrong_in_a_branch_is_told() -> Result<()> {
    let (x, ws, s) = world(true);
    let branches =
        || -> Vec<Branch> { ROWS.iter().zip(&ws).map(|(n, w)| branch(*n, w, &s)).collect() };
    let with = |work: fn(Tensor) -> Result<Tensor>| {
        let mut all = branches();
        all[3].f = Box::new(move |_| Ok(Box::new(work)));
        side_by_side(&x, all)
    };
    let e = with(|_| Err(Error::invalid("the fourth", "has had enough"))).unwrap_err();
    assert!(e.to_string().contains("has had enough"), "{e}");
    let e = with(|x| Tensor::cat(&[x.clone(), x], 0)).unwrap_err().to_string();
    assert!(e.contains("a branch with 1 rows gives"), "{e}");
    assert!(side_by_side(&x, branches().split_off(1)).is_err(), "rows that are not all of x");
    let panicked = std::panic::catch_unwind(|| {
        let (x, _, _) = world(false);
        let f = |_: Vec<Tensor>| -> Result<Work<'static>> { Ok(Box::new(|_| panic!("dear me"))) };
        side_by_side(&x, vec![Branch { rows: x.len_of(0), phi: Vec::new(), f: Box::new(f) }])
    });
    let message = panicked.unwrap_err();
    assert_eq!(message.downcast_ref::<&str>(), Some(&"dear me"));
    Ok(())
}

/// The result does not depend on the number of threads, and a branch can have branches.
#[test]
fn branches_in_branches() -> Result<()> {
    let (x, ws, s) = world(true);
    let [_, plain] = both(&x, &ws, &s)?;
    let nested = |own: Vec<Tensor>| -> Result<Work<'static>> {
        Ok(Box::new(move |x| {
            let (ws, s) = own.split_at(5);
            side_by_side(&x, ROWS.iter().zip(ws).map(|(n, w)| branch(*n, w, &s[0])).collect())
        }))
    };
    let phi: Vec<Tensor> = ws.iter().chain([&s]).cloned().collect();
    let twice = Tensor::cat(&[x.clone(), x.clone()], 0)?;
    let half = |phi: &[Tensor]| Branch { rows: 14, phi: phi.to_vec(), f: Box::new(nested) };
    let y = side_by_side(&twice, vec![half(&phi), half(&phi)])?;
    assert!(y.narrow(0, 14, 14)?.all_close(&plain, 1e-12, 1e-12)?);
    let once = gradients(&plain, &[&x])?[0].clone().unwrap();
    let probe = leaf("probe", &plain.size(), false);
    let found = y.narrow(0, 0, 14)?.mul(&probe)?.sum()?.gradients(&[&x], false)?;
    assert!(found[0].as_ref().unwrap().all_close(&once, 1e-12, 1e-12)?);
    Ok(())
}

#[test]
fn one_part_that_outweighs_the_others_gets_all_threads() {
    set_threads(2);
    assert!(suits_side_by_side(&[10, 10, 10], Device::Cpu));
    assert!(suits_side_by_side(&[30, 10, 10, 10], Device::Cpu));
    assert!(!suits_side_by_side(&[40, 10, 10], Device::Cpu));
    assert!(!suits_side_by_side(&[40], Device::Cpu));
    set_threads(1);
    assert!(!suits_side_by_side(&[10, 10, 10], Device::Cpu));
    set_threads(3);
}
