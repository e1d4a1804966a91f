//! The speech front ends against PyTorch: tiny ones, and the published ones.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::{Path, PathBuf};

use modl_core::checkpoint::Checkpoint;
use modl_core::{Device, Error, Kind, Tensor, Tensors, no_grad};
use modl_models::{LoadOptions, SpeakerEncoder, VoiceActivity};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn golden(name: &str) -> Tensors {
    let file = Checkpoint::open(fixture(name)).unwrap();
    file.tensors(Device::Cpu).unwrap().into_iter().collect()
}

/// An optional asset, which the run of all tests does not fetch.
fn asset(folder: &str, file: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets").join(folder).join(file);
    if !path.exists() {
        eprintln!("skipped: `cargo xtask assets {folder}` fetches the model");
        return None;
    }
    Some(path)
}

#[track_caller]
fn same(found: Result<Tensor, Error>, golden: &Tensors, name: &str) {
    let (found, wanted) = (found.unwrap(), golden.need(name).unwrap());
    let apart = found.max_abs_diff(wanted).unwrap();
    eprintln!("{name}: {apart:.1e} apart");
    assert!(found.all_close(wanted, 1e-5, 1e-5).unwrap(), "{name}: {apart}");
}

#[test]
fn a_tiny_speaker_encoder_is_pytorchs() {
    let golden = golden("speech/golden.safetensors");
    let options = LoadOptions::default();
    let encoder = SpeakerEncoder::load(fixture("speech/speaker.pt"), &options).unwrap();
    let mels = golden.need("mels").unwrap();
    same(no_grad(|| encoder.embed(mels)), &golden, "embed");
    let e = encoder.embed(&mels.narrow(2, 0, 4).unwrap()).unwrap_err().to_string();
    assert!(e.contains("[2, 9, 4], wants [batch, frames, 5]"), "{e}");
    assert!(encoder.embed(&mels.narrow(1, 0, 0).unwrap()).is_err());
    let e = SpeakerEncoder::load(fixture("speech/voice.safetensors"), &options).unwrap_err();
    assert!(e.to_string().contains("lstm.weight_ih_l0"), "{e}");
}

#[test]
fn a_tiny_voice_activity_is_pytorchs() {
    let golden = golden("speech/golden.safetensors");
    let options = LoadOptions::default();
    let voice = VoiceActivity::load(fixture("speech/voice.safetensors"), &options).unwrap();
    assert_eq!(voice.chunk(), 32);
    let waves = golden.need("waves").unwrap();
    same(no_grad(|| voice.probabilities(waves)), &golden, "probabilities");
    assert!(voice.probabilities(&waves.narrow(1, 0, 0).unwrap()).is_err());
    assert!(voice.probabilities(&waves.select(0, 0).unwrap()).is_err());
    let e = VoiceActivity::load(fixture("speech/speaker.pt"), &options).unwrap_err();
    assert!(e.to_string().contains("stft_conv.weight"), "{e}");
}

#[test]
#[ignore = "needs: cargo xtask assets resemblyzer"]
fn resemblyzer_is_pytorchs() {
    let Some(path) = asset("resemblyzer", "pretrained.pt") else { return };
    let golden = golden("real_resemblyzer/golden.safetensors");
    let encoder = SpeakerEncoder::load(path, &LoadOptions::default()).unwrap();
    same(no_grad(|| encoder.embed(golden.need("mels").unwrap())), &golden, "embed");
}

#[test]
#[ignore = "needs: cargo xtask assets silero-vad"]
fn silero_vad_is_pytorchs() {
    let Some(path) = asset("silero-vad", "silero_vad_16k.safetensors") else { return };
    let golden = golden("speech/golden.safetensors");
    let voice = VoiceActivity::load(path, &LoadOptions::default()).unwrap();
    assert_eq!(voice.chunk(), 512);
    // The waveforms are kept in f16: these are exactly what PyTorch was given.
    let waves = golden.need("real_waves").unwrap().to_kind(Kind::Float).unwrap();
    same(no_grad(|| voice.probabilities(&waves)), &golden, "real_probabilities");
}
