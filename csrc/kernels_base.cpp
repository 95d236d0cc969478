#define NGAME_ISA baseline
#define NGAME_VECTOR_BYTES 16
#include "kernels-inl.h"
