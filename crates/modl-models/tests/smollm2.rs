//! The real SmolLM2 (4 bits, GGUF) against transformers.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use modl_core::{Context, Device, Modular, Seed, Tensor, Tensors, no_grad};
use modl_models::{Generation, LoadOptions, Tokenizer, generate, open};

#[test]
#[ignore = "needs: cargo xtask assets smollm2"]
fn the_capital_of_france_is_paris() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../assets/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    if !path.exists() {
        // An optional asset, which the run of all tests does not fetch.
        eprintln!("skipped: `cargo xtask assets smollm2` fetches the model");
        return;
    }
    let tokenizer = Tokenizer::open(&path).unwrap();
    let ids = tokenizer.encode_one("The capital of France is").unwrap();
    assert_eq!(ids, [504, 3575, 282, 4649, 314]);
    let ids = Tensor::from_slice(&ids, &[1, 5], Device::Cpu).unwrap();
    let inputs = Tensors::new().with("input_ids", ids);
    let model = Modular::from_box(open(&path, &LoadOptions::default()).unwrap(), Seed(1)).unwrap();
    let cx = Context::eval();
    let outputs = no_grad(|| model.forward(&inputs, &cx)).unwrap();
    let last = outputs.need("logits").unwrap().select(1, -1).unwrap();
    let last = last.to_vec::<f64>().unwrap();
    // transformers 5.24 in f32 on the same file.
    for (found, wanted) in last.iter().zip([1.613647, -11.871873, -7.944453, -9.346931, -10.085238])
    {
        assert!((found - wanted).abs() < 1e-4, "{:?}", &last[..5]);
    }
    let how = Generation { max_tokens: 16, ..Generation::default() };
    let found = generate(&model, &inputs, &cx, &how).unwrap();
    let text = tokenizer.decode(&found[0]).unwrap();
    assert!(text.starts_with(" Paris.\n\nThe answer is: 2018-01"), "{text}");
    let slow = Generation { max_tokens: 8, cache: false, ..how };
    assert_eq!(generate(&model, &inputs, &cx, &slow).unwrap()[0], found[0][..8]);
}
