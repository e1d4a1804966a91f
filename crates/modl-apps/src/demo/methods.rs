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

    /// The name of its files.
    pub(crate) fn name(self) -> &'static str {
        self.words().0
    }

    /// For tables and plots.
    pub(crate) fn title(self) -> &'static str {
        self.words().1
    }

    /// A sentence or two for the report.
    pub(crate) fn description(self) -> &'static str {
        self.words().2
    }

    fn words(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Method::LinearHead => (
                "linear_head",
                "frozen + linear head",
                "No module: a ridge regression on the frozen sentence vectors of all \
                 domains. Every other method keeps this head, frozen.",
            ),
            Method::OneForAll => (
                "one_for_all",
                "one LoRA for all",
                "One LoRA, trained on the texts of all domains together.",
            ),
            Method::KnownDomain => (
                "known_domain",
                "LoRA of the domain",
                "Four LoRAs, each trained on its own domain; at test the domain is known \
                 (fixed routing).",
            ),
            Method::SoftRouter => (
                "soft_router",
                "router, soft",
                "The same four LoRAs, frozen; a router that is not told the domain mixes \
                 them for each text.",
            ),
            Method::Top1Router => (
                "top1_router",
                "router, top-1",
                "The same four LoRAs, frozen; a router that is not told the domain picks \
                 one for each text.",
            ),
            Method::MergedAverage => (
                "merged_average",
                "merged: average",
                "The four LoRAs made into one of the same rank: A and B averaged each by \
                 itself, which is not the average of the changes.",
            ),
            Method::MergedExact => (
                "merged_exact",
                "merged: exact",
                "The four LoRAs made into one of four times the rank, whose change is \
                 exactly the average of theirs.",
            ),
            Method::WrongDomain => (
                "wrong_domain",
                "LoRA of a wrong domain",
                "A control: each domain with the LoRA of the next one.",
            ),
        }
    }
}
