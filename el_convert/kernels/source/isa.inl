// The engine for one instruction set: the file that includes this has chosen `Simd` and how signs
// are counted.
#include "pack.inl"
#include "squeeze.inl"
#include "steps.inl"
#include "activation.inl"
#include "links.inl"
#include "epilogue.inl"
#include "strip.inl"
#include "pool.inl"
#include "linear.inl"
#include "passes.inl"
