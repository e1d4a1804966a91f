//! Frozen front ends for speech: whose voice it is, and whether somebody speaks.

mod lstm;
mod speaker_encoder;
mod voice_activity;

pub use speaker_encoder::SpeakerEncoder;
pub use voice_activity::VoiceActivity;
