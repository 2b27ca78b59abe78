//! Decompositions of the small symmetric matrices that the curvature needs.
