// Cutting a convolution's output into strips that are worked on one by one.
#ifndef EL_CONVERT_STRIPS_H
#define EL_CONVERT_STRIPS_H

#include "plan.h"

namespace el {

const int64_t kStripBytes = 128 * 1024;  // of scratch: well inside a second-level cache

// Rows of each image, or, for pointwise convolutions, pixels of all images: of equal number, or one
// more, in each strip.
class Strips {
  public:
    Strips(const Convolution &conv, int64_t batch, int64_t height, int64_t width, int64_t threads)
        : pointwise_(conv.pointwise), pixels_(pointwise_ ? conv.isa->counting.together : 1) {
        images_ = pointwise_ ? 1 : batch;
        rows_ = pointwise_ ? batch * height * width : height;
        width_ = pointwise_ ? 1 : width;
        const int64_t most =
            max64(pointwise_ ? kRunPixels : 1, kStripBytes / row_bytes(conv, width));
        units_ = (rows_ + pixels_ - 1) / pixels_;
        const int64_t wanted = (rows_ + most - 1) / most;
        // As many for each thread.
        const int64_t shared = whole(images_ * wanted, max64(threads, 1)) / max64(images_, 1);
        per_image_ = max64(1, min64(max64(wanted, shared), units_));
    }

    int64_t count() const { return images_ * per_image_; }

    Strip at(int64_t index) const {
        const int64_t part = index % per_image_;
        return between(index / per_image_, units_ * part / per_image_ * pixels_,
                       min64(units_ * (part + 1) / per_image_ * pixels_, rows_));
    }

    Strip largest() const {
        return between(0, 0, min64((units_ + per_image_ - 1) / per_image_ * pixels_, rows_));
    }

  private:
    bool pointwise_;
    int64_t pixels_;  // that are not parted
    int64_t images_, rows_, width_, units_, per_image_;

    static int64_t row_bytes(const Convolution &conv, int64_t width) {
        const int pixels = conv.isa->counting.pixels;
        if (conv.pointwise) return 2 * conv.padded_out + conv.units / pixels + conv.pixel_bytes;
        const el_geometry &g = conv.shape;
        const int64_t pixel = conv.depthwise ? conv.padded_out : conv.units;
        return max64(1, whole(width, pixels) *
                            (2 * conv.padded_out + g.stride_h * g.stride_w * pixel));
    }

    Strip between(int64_t image, int64_t begin, int64_t end) const {
        if (pointwise_) return Strip{0, 0, 1, begin, end};
        return Strip{image, begin, end, 0, width_};
    }
};

}  // namespace el
#endif
