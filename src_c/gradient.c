/* A block's gradient before the rule sees it: gathered where it is laid out otherwise than its
 * parameter, unscaled and summed where gradients accumulate, zeroed when all is done. */
#include "plan.h"
#include <string.h>

#define MAX_DIMS 64 /* axes of a gradient; NumPy allows no more */

/* Copies n elements of the gradient, from `first` in the parameter's memory order, to `to`; or,
 * where `to` is NULL, zeroes them in place. */
static void gather(const fo_tensor *t, int64_t first, int64_t n, char *to)
{
    const int last = t->grad_ndim - 1;
    const ptrdiff_t step = t->grad_strides[last];
    const size_t item = fo_storages[t->dtype.of.grad].bytes;
    ptrdiff_t index[MAX_DIMS];
    char *at = t->grad;
    for (int axis = last; axis >= 0; axis--) {
        index[axis] = (ptrdiff_t)(first % t->grad_shape[axis]);
        first /= t->grad_shape[axis];
        at += index[axis] * t->grad_strides[axis];
    }
    while (n > 0) {
        const int64_t left = t->grad_shape[last] - index[last], run = n < left ? n : left;
        if (!to) {
            for (int64_t i = 0; i < run; i++)
                memset(at + i * step, 0, item);
        } else if (item == 4) { /* sizes that a compiler knows are copied faster */
            for (int64_t i = 0; i < run; i++)
                memcpy(to + i * 4, at + i * step, 4);
        } else if (item == 8) {
            for (int64_t i = 0; i < run; i++)
                memcpy(to + i * 8, at + i * step, 8);
        } else {
            for (int64_t i = 0; i < run; i++)
                memcpy(to + i * 2, at + i * step, 2);
        }
        n -= run;
        if (to)
            to += (size_t)run * item;
        at -= index[last] * step;
        index[last] = 0;
        for (int axis = last - 1; axis >= 0; axis--) { /* the odometer's next number */
            at += t->grad_strides[axis];
            if (++index[axis] < t->grad_shape[axis])
                break;
            at -= index[axis] * t->grad_strides[axis];
            index[axis] = 0;
        }
    }
}

void fo_convert(const fo_table *table, fo_dtype type, fo_dtype stored, int64_t n, void *to,
                const void *from)
{
    _Alignas(64) char single[FO_BLOCK * sizeof(float)];
    fo_load *const load = table->load[stored];
    if (fo_storages[stored].arithmetic == type) {
        load(n, to, from, NULL);
        return;
    }
    if (load)
        load(n, single, from, NULL);
    table->widen(n, to, load ? single : from);
}

const void *fo_read_grad(const fo_step *s, const fo_tensor *t, int64_t at, int64_t n, char *buffer)
{
    _Alignas(64) char gathered[FO_BLOCK * sizeof(double)];
    const fo_dtype dtype = t->dtype.of.grad, type = arithmetic_of(t);
    const char *const in_place = (const char *)t->grad + (size_t)at * fo_storages[dtype].bytes;
    if (dtype == type && t->grad_ndim == 0)
        return in_place;
    if (t->grad_ndim != 0)
        gather(t, at, n, dtype == type ? buffer : gathered);
    if (dtype != type)
        fo_convert(s->table, type, dtype, n, buffer, t->grad_ndim != 0 ? gathered : in_place);
    return buffer;
}

const void *fo_mean_grad(const fo_step *s, const fo_tensor *t, int64_t offset, int64_t at,
                         int64_t n, char *buffer)
{
    _Alignas(64) char summed[FO_BLOCK * sizeof(double)];
    const array sums = sums_of(t);
    const void *sum = t->has_sum ? decoded(s, &sums, offset, n, summed) : NULL;
    const void *grad = t->grad ? fo_read_grad(s, t, at, n, buffer) : NULL;
    s->table->mean[arithmetic_of(t)](n, buffer, sum, grad, s->scale,
                                     s->args->add ? 1 : (double)s->args->accumulate);
    return buffer;
}

void fo_zero_grad(const fo_tensor *t, int64_t at, int64_t n)
{
    const size_t item = fo_storages[t->dtype.of.grad].bytes;
    if (t->grad_ndim == 0)
        memset((char *)t->grad + (size_t)at * item, 0, (size_t)n * item);
    else
        gather(t, at, n, NULL);
}
