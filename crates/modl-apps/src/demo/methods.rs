//! What is compared.

use serde::{Deserialize, Serialize};

/// A way to use modules, in the order of the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Method {
    LinearHead,
    OneForAll,
    KnownDomain,
    SoftRouter,
    Top1Router,
    MergedAverage,
    MergedExact,
    WrongDomain,
}

impl Method {
    pub(crate) const ALL: [Method; 8] = [
        Method::LinearHead,
        Method::OneForAll,
        Method::KnownDomain,
        Method::SoftRouter,
        Method::Top1Router,
        Method::MergedAverage,
        Method::MergedExact,
        Method::WrongDomain,
    ];

    /// For tables and plots.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Method::LinearHead => "frozen + linear head",
            Method::OneForAll => "one LoRA for all",
            Method::KnownDomain => "LoRA of the domain",
            Method::SoftRouter => "router, soft",
            Method::Top1Router => "router, top-1",
            Method::MergedAverage => "merged: average",
            Method::MergedExact => "merged: exact",
            Method::WrongDomain => "LoRA of a wrong domain",
        }
    }

    /// One sentence for the report.
    pub(crate) fn description(self) -> &'static str {
        match self {
            Method::LinearHead => {
                "No module: a ridge regression on the frozen sentence vectors of all domains. Every other method keeps this head, frozen."
            }
            Method::OneForAll => "One LoRA, trained on the texts of all domains together.",
            Method::KnownDomain => {
                "Four LoRAs, each trained on its own domain; at test the domain is known (fixed routing)."
            }
            Method::SoftRouter => {
                "The same four LoRAs, frozen; a router that is not told the domain mixes them for each text."
            }
            Method::Top1Router => {
                "The same four LoRAs, frozen; a router that is not told the domain picks one for each text."
            }
            Method::MergedAverage => {
                "The four LoRAs made into one of the same rank: A and B averaged each by itself, which is not the average of the changes."
            }
            Method::MergedExact => {
                "The four LoRAs made into one of four times the rank, whose change is exactly the average of theirs."
            }
            Method::WrongDomain => "A control: each domain with the LoRA of the next one.",
        }
    }
}
