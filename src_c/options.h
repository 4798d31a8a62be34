/* The options of steps: for api.c, which includes it alone. */
#ifndef FO_OPTIONS_H
#define FO_OPTIONS_H

#include "core.h"
#include "errors.h"
#include <float.h>

static fo_status check_options(const fo_options *o)
{
    const struct {
        const char *name;
        int32_t value, low, high;
    } numbers[] = {
        {"semantics", o->semantics, FO_TORCH, FO_KERAS},
        {"clip", o->clip, FO_NO_CLIP, FO_GLOBAL_CLIP_NORM},
        {"nonfinite", o->nonfinite, FO_PROPAGATE, FO_RAISE},
        {"num_threads", o->num_threads, 0, FO_MAX_THREADS},
        {"accumulate", o->accumulate, 0, INT32_MAX},
    };
    fo_status status = check_size("fo_options", o->size, sizeof *o);
    for (size_t j = 0; j < sizeof numbers / sizeof *numbers && !status; j++)
        status = check_between(numbers[j].name, numbers[j].value, numbers[j].low, numbers[j].high);
    if (status)
        return status;
    if (o->clip != FO_NO_CLIP && !(o->clip_limit > 0))
        return fail(FO_BAD_VALUE, "clip_limit must be above 0, got %g", o->clip_limit);
    /* Its reciprocal has to be a float. */
    if (o->loss_scale != 0 && !(o->loss_scale >= FLT_MIN && o->loss_scale <= 1 / FLT_MIN))
        return fail(FO_BAD_VALUE, "loss_scale must be 0 (for 1) or between %g and %g, got %g",
                    FLT_MIN, 1 / FLT_MIN, o->loss_scale);
    if (!(o->ema_decay >= 0 && o->ema_decay <= 1))
        return fail(FO_BAD_VALUE, "ema_decay must be between 0 and 1, got %g", o->ema_decay);
    return FO_OK;
}

/* What a plan is told of them. */
static fo_step_args step_args(const fo_options *o)
{
    return (fo_step_args){
        .semantics = o->semantics,
        .clip = o->clip,
        .clip_limit = o->clip_limit,
        .nonfinite = o->nonfinite,
        .loss_scale = o->loss_scale != 0 ? o->loss_scale : 1,
        .accumulate = o->accumulate != 0 ? o->accumulate : 1,
        .ema_decay = o->ema_decay,
        .ema_starts = o->ema_starts != 0,
        .zero_grad = o->zero_grad != 0,
        .max_threads = o->num_threads,
    };
}

#endif
