// Hides where a value comes from. Without it GCC reloads a vector for each multiply-add that it
// feeds (twice the loads), and keeps one address per row in a register of its own (spills).
// Included once per ISA, by foreach_isa.h.

namespace cvfast::CVFAST_ISA_NAMESPACE {

CVFAST_INLINE void opaque(Vec& v) { __asm__("" : "+" CVFAST_VECTOR_REGISTER(v)); }

template <class T>
CVFAST_INLINE void opaque(const T*& p) {
    __asm__("" : "+r"(p));
}

}  // namespace cvfast::CVFAST_ISA_NAMESPACE
