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

static inline bool is_usual(const el_epilogue &e, bool residual) {
    const bool simple = e.activation != EL_ACT_SILU && e.activation != EL_ACT_HARDSWISH;
    return simple && e.scale && !e.bias && e.norm_scale && !e.link_after_norm && !e.act_in &&
           !e.act_out && !(residual && e.residual_last);
}
