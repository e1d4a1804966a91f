//! Where a site is among those of a module: the layer, and the position within it.

use modl_core::{Attachment, Site};

/// The number of layers and positions, and which of them a site has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) layers: i64,
    pub(super) layer: i64,
    pub(super) positions: i64,
    pub(super) position: i64,
    /// The position in words: `attention.self.query`.
    pub(super) position_name: String,
}

impl Place {
    pub(super) fn of(at: &Attachment) -> Self {
        let (mut layers, mut positions) = (Vec::new(), Vec::new());
        for site in at.sites.iter().chain([at.site]) {
            let (layer, position) = split(site);
            number(&mut layers, layer);
            number(&mut positions, position);
        }
        let (layer, position) = split(at.site);
        Place {
            layer: number(&mut layers, layer),
            position: number(&mut positions, position),
            layers: layers.len() as i64,
            positions: positions.len() as i64,
            position_name: position.to_owned(),
        }
    }
}

/// The path up to its first number that stands alone, and the rest. Sites outside all layers are
/// in the layer without a name.
fn split(site: &Site) -> (&str, &str) {
    let mut end = 0;
    for part in site.path.split('.') {
        end += part.len();
        if part.parse::<u64>().is_ok() {
            let (layer, rest) = site.path.split_at(end);
            return (layer, rest.strip_prefix('.').unwrap_or(rest));
        }
        end += 1;
    }
    ("", &site.path)
}

/// The number of `name` in the order of first appearance.
fn number<'a>(known: &mut Vec<&'a str>, name: &'a str) -> i64 {
    let at = known.iter().position(|k| *k == name).unwrap_or_else(|| {
        known.push(name);
        known.len() - 1
    });
    at as i64
}

#[cfg(test)]
mod tests {
    use super::*;
    use modl_core::{SiteKind, Tensors};

    #[test]
    fn layers_of_two_stacks_are_told_apart_and_positions_are_shared() {
        let paths = ["encoder.0.q", "encoder.0.v", "encoder.1.q", "decoder.0.q", "head"];
        let site = |(index, path): (usize, &&str)| Site {
            path: path.to_string(),
            kind: SiteKind::Linear,
            input: 4,
            output: 4,
            index,
        };
        let sites: Vec<Site> = paths.iter().enumerate().map(site).collect();
        let theta = Tensors::new();
        let place = |i: usize| {
            let p = Place::of(&Attachment { site: &sites[i], theta: &theta, sites: &sites });
            assert_eq!((p.layers, p.positions), (4, 3));
            (p.layer, p.position)
        };
        let places: Vec<_> = (0..5).map(place).collect();
        assert_eq!(places, [(0, 0), (0, 1), (1, 0), (2, 0), (3, 2)]);
    }
}
