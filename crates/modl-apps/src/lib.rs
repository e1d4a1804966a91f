//! The modl command line.
