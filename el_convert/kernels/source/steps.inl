// Which steps an epilogue has, known while it runs or when this is compiled. Included once per
// instruction set.

// What an epilogue does, asked of it for every vector.
struct AnySteps {
    static inline bool scales(const el_epilogue &e) { return e.scale; }
    static inline bool biased(const el_epilogue &e) { return e.bias; }
    static inline bool normed(const el_epilogue &e) { return e.norm_scale; }
    static inline bool link_last(const el_epilogue &e) { return e.link_after_norm; }
    static inline bool residual_last(const el_epilogue &e) { return e.residual_last; }
    static inline bool residual(const float *residual) { return residual; }
    static inline int activation(const el_epilogue &e) { return e.activation; }
    static inline bool shifts(const float *shift) { return shift; }
};

// What most do, known when this is compiled: a scale, no bias, a norm, the gate before it.
template <bool kResidual, int kActivation>
struct UsualSteps {
    static inline bool scales(const el_epilogue &) { return true; }
    static inline bool biased(const el_epilogue &) { return false; }
    static inline bool normed(const el_epilogue &) { return true; }
    static inline bool link_last(const el_epilogue &) { return false; }
    static inline bool residual_last(const el_epilogue &) { return false; }
    static inline bool residual(const float *) { return kResidual; }
    static inline int activation(const el_epilogue &) { return kActivation; }
    static inline bool shifts(const float *) { return false; }
};

// Whether norm and activation are the usual ones.
static inline bool ends_usually(const el_epilogue &e) {
    const bool simple = e.activation != EL_ACT_SILU && e.activation != EL_ACT_HARDSWISH;
    return simple && e.norm_scale && !e.act_in && !e.act_out;
}

static inline bool is_usual(const el_epilogue &e, bool residual) {
    return ends_usually(e) && e.scale && !e.bias && !e.link_after_norm &&
           !(residual && e.residual_last);
}

// A clamp to what changes nothing, where there is no activation.
static inline el_epilogue clamped(const el_epilogue &epilogue) {
    el_epilogue e = epilogue;
    if (e.activation == EL_ACT_NONE) e.low = -INFINITY, e.high = INFINITY;
    return e;
}
