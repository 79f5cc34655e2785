// The engine for one instruction set: the file that includes this has chosen `Simd`.
#include "pack.inl"
#include "tile.inl"
#include "epilogue.inl"
#include "strip.inl"
#include "pool.inl"
