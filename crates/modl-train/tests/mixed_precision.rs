//! Parameters in bf16 have masters in f32: the same as a loop by hand, over stops and restarts.
#![allow(clippy::unwrap_used)]

mod toy;

use modl_core::checkpoint::Checkpoint;
use modl_core::testing::TinyBackbone;
use modl_core::{Context, Device, Kind, Modular, Seed, Select, Tensor, no_grad};
use modl_train::{Batch, Batches, Objective, TrainConfig, Trainer, clip_grad_norm};
use toy::{StopAfter, data, head};

const STEPS: u64 = 40;
/// So small that one step is lost for most numbers in bf16.
const LR: f64 = 1e-4;

fn model() -> Modular {
    let backbone = TinyBackbone::new(Seed(1), Kind::BFloat16).unwrap();
    let mut model = Modular::new(backbone, Seed(3)).unwrap();
    head().setup(&mut model).unwrap();
    model
}

fn config() -> TrainConfig {
    TrainConfig {
        train: vec!["base.*".into(), "heads.*".into()],
        steps: Some(STEPS),
        batch_size: 4,
        lr: LR,
        checkpoint_every: 10,
        ..TrainConfig::default()
    }
}

/// How many numbers in bf16 are as they were.
fn unchanged(params: &[(String, Tensor)], start: &[Tensor]) -> usize {
    let mut same = 0;
    for ((_, t), before) in
        params.iter().zip(start).filter(|((_, t), _)| t.kind() == Kind::BFloat16)
    {
        let (now, then) = (t.to_vec::<f64>().unwrap(), before.to_vec::<f64>().unwrap());
        same += now.iter().zip(&then).filter(|(a, b)| a == b).count();
    }
    same
}

#[test]
fn small_steps_add_up_in_the_masters() {
    let (whole, by_hand, head, config) = (model(), model(), head(), config());
    let folder = tempfile::tempdir().unwrap();
    let train = |model: &Modular, sink: &mut dyn modl_train::Sink| {
        let trainer = Trainer::new("toy", model, &head, config.clone(), Seed(7)).unwrap();
        trainer.keep_in(folder.path()).train(&toy::data(10), &Batch::describe, sink)
    };
    // Stopped twice on the way.
    for _ in 0..2 {
        train(&model(), &mut StopAfter(1)).unwrap_err();
    }
    train(&whole, &mut Vec::new()).unwrap();

    by_hand.train_only(&Select::any(config.train.clone())).unwrap();
    let params = by_hand.trainable();
    let wide = |t: &Tensor| t.detach().unwrap().copy().unwrap().to_kind(Kind::Float).unwrap();
    let masters: Vec<(String, Tensor)> = params.iter().map(|(n, t)| (n.clone(), wide(t))).collect();
    let start: Vec<Tensor> =
        params.iter().map(|(_, t)| t.detach().unwrap().copy().unwrap()).collect();
    let mut optimizer = config.optimizer.build().unwrap();
    let data = data(10);
    let mut batches = Batches::new(&data, 4, Seed(7), Device::Cpu, Default::default()).unwrap();
    let mut kept_after_one = 0;
    for step in 0..STEPS {
        let batch = batches.advance().unwrap();
        let cx = Batch::describe(&batch, Context::train(Seed(7), step)).unwrap();
        let loss = head.loss(&by_hand, &batch, &cx).unwrap();
        let leaves: Vec<&Tensor> = params.iter().map(|(_, t)| t).collect();
        let grads = loss.gradients(&leaves, false).unwrap();
        let mut grads: Vec<_> = grads.into_iter().map(|g| g.map(|g| wide(&g))).collect();
        clip_grad_norm(&mut grads, config.clip).unwrap();
        let lr = LR * config.schedule.factor(step, STEPS);
        optimizer.step(&masters, &grads, &|_| lr).unwrap();
        no_grad(|| {
            for ((_, t), (_, master)) in params.iter().zip(&masters) {
                t.clone().copy_from(master).unwrap();
            }
        });
        if step == 0 {
            kept_after_one = unchanged(&params, &start);
        }
    }
    let kept_in_the_end = unchanged(&params, &start);
    assert!(kept_after_one > 2 * kept_in_the_end, "{kept_after_one} {kept_in_the_end}");
    let file = Checkpoint::open(folder.path().join(format!("state-{STEPS}.safetensors"))).unwrap();
    for ((name, t), (_, master)) in params.iter().zip(&masters) {
        let kept = file.tensor(&format!("params.{name}"), Device::Cpu).unwrap();
        assert_eq!(kept.kind(), Kind::Float, "{name}");
        assert!(kept.bit_equal(master).unwrap(), "{name}");
        let trained = whole.trainable().into_iter().find(|(n, _)| n == name).unwrap().1;
        assert_eq!(trained.kind(), t.kind());
        assert!(trained.bit_equal(t).unwrap(), "{name}");
    }
}
