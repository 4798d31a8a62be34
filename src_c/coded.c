/* Elements that are stored in another type than rules compute in: stretches that fit the first cache are
 * decoded, updated and encoded again; or a loop does it all that is made for such types. */
#include "platform.h"
#include "random.h"
#include "rule.h"
#include "update.h"

/* The loop that is made for what is stored as it is here, or NULL. */
static fo_fused *find_fused(const fo_step *s, const fo_tensor *t, const tensor_work *w)
{
    static const uint8_t types[][3] = {
#define FO_FUSED_TYPES(name, param, grad, state, unused)                                           \
    {FO_DTYPE_##param, FO_DTYPE_##grad, FO_DTYPE_##state},
        FO_EACH_FUSED(FO_FUSED_TYPES, )};
    const int *needs = s->plan->rule->slot_needs;
    if (t->grad_ndim != 0 || t->sum)
        return NULL;
    for (int k = 0; k < FO_FUSED_COUNT; k++) {
        bool same = t->dtype.of.param == types[k][0] && t->dtype.of.grad == types[k][1];
        for (int j = 0; j < FO_MAX_SLOTS && same; j++) {
            if (w->slots & FO_SLOT(j))
                same = t->dtype.of.slot[j] == (needs[j] & EXACT ? FO_F32 : types[k][2]);
        }
        if (same)
            return s->table->fused[s->plan->rule - fo_rules][k][w->variant];
    }
    return NULL;
}

/* How many elements, an even number, come before a cache line of the array that has the most bytes:
 * none of its vectors then lies in two, and few of the others' do. */
static int64_t before_line(const fo_tensor *t, const fo_coding *coding, unsigned slots,
                           int64_t offset)
{
    array widest = array_of(t, coding, 0);
    for (int j = 0; j < FO_MAX_SLOTS; j++) {
        const array a = {t->dtype.of.slot[j], t->slot[j], NULL};
        if (slots & FO_SLOT(j) && fo_storages[a.dtype].bytes > fo_storages[widest.dtype].bytes)
            widest = a;
    }
    const size_t item = fo_storages[widest.dtype].bytes;
    const uintptr_t at = (uintptr_t)widest.data + (size_t)offset * item;
    return (int64_t)((-at & (CACHE_LINE - 1)) / item) & ~INT64_C(1);
}

/* Does what a loop made for it can, from `offset` on; returns how many elements that are. */
static int64_t update_fused(const fo_step *s, const fo_tensor *t, const tensor_work *w,
                            int64_t offset, int64_t at, int64_t n, uint64_t key)
{
    const unsigned slots = w->slots;
    const fo_coding *coding = w->coding;
    const int64_t element = coding->first + offset, upper = element >> 32;
    const int64_t left = ((upper + 1) << 32) - element; /* that have the upper half in common */
    fo_fused *const fused = find_fused(s, t, w);
    fo_stored stored[1 + FO_MAX_SLOTS] = {{NULL, NULL}};
    if (!fused || element % 2 != 0)
        return 0;
    unsigned random = 0; /* arrays that could be rounded at random: all of them are, or none */
    for (int j = 0; j <= FO_MAX_SLOTS; j++) {
        const array a = array_of(t, coding, j);
        if (j != 0 && !(slots & FO_SLOT(j - 1)))
            continue;
        stored[j] = (fo_stored){(char *)a.data + (size_t)offset * fo_storages[a.dtype].bytes,
                                beside_at(&a, offset)};
        if (a.dtype != FO_F32 && a.dtype != FO_BF16_SPLIT)
            random |= FO_SLOT(j);
    }
    const unsigned stochastic = coding->stochastic & random;
    if (stochastic != random && stochastic != 0)
        return 0;
    n = n < left ? n : left;
    n -= n % 2;
    const int64_t head = n < MIN_TO_ALIGN ? 0 : before_line(t, coding, slots, offset);
    n = head > 0 ? head : n;
    const fo_stored grad = {(char *)t->grad + (size_t)at * fo_storages[t->dtype.of.grad].bytes,
                            NULL};
    fused(n, stored, &grad, stochastic != 0, fo_key(key, upper), (uint32_t)element, w->consts,
          w->gscale, w->gmax);
    return n;
}

void fo_update_coded(const fo_step *s, const fo_tensor *t, const tensor_work *w, int64_t offset,
                     int64_t at, int64_t n)
{
    _Alignas(64) char buffers[2 + FO_MAX_SLOTS][FO_STRETCH * sizeof(double)];
    _Alignas(64) uint16_t random[1 + FO_MAX_SLOTS][FO_STRETCH];
    const fo_coding *coding = w->coding;
    const unsigned slots = w->slots;
    const array grads = {t->dtype.of.grad, t->grad, NULL};
    const int64_t end = offset + n;
    uint64_t key = fo_mix64(coding->seed + FO_GOLDEN);
    key = fo_key(fo_key(key, w->step), coding->index);

    for (int64_t done = 1; done > 0; offset += done, at += done)
        done = offset < end ? update_fused(s, t, w, offset, at, end - offset, key) : 0;
    for (; offset < end; offset += FO_STRETCH, at += FO_STRETCH) {
        const int64_t m = end - offset < FO_STRETCH ? end - offset : FO_STRETCH;
        const int64_t left = t->size - offset - m, next = left < FO_STRETCH ? left : FO_STRETCH;
        const void *grad = effective_grad(s, t, w, offset, at, m, buffers[1 + FO_MAX_SLOTS]);
        void *elements[1 + FO_MAX_SLOTS] = {NULL};
        if (t->grad && t->grad_ndim == 0)
            fo_fetch(&grads, at + m, next);
        for (int j = 0; j <= FO_MAX_SLOTS; j++) {
            const array a = array_of(t, coding, j);
            if (j == 0 || slots & FO_SLOT(j - 1)) {
                elements[j] = decoded(s, &a, offset, m, buffers[j]);
                fo_fetch(&a, offset + m, next);
            }
        }
        w->update(m, elements[0], grad, elements + 1, w->consts, w->gscale, w->gmax);
        if (coding->stochastic)
            s->table->random(m, random, coding->stochastic, key, coding->first + offset);
        for (int j = 0; j <= FO_MAX_SLOTS; j++) {
            const array a = array_of(t, coding, j);
            if (elements[j])
                put(s, &a, offset, m, elements[j],
                    coding->stochastic & FO_SLOT(j) ? random[j] : NULL);
        }
    }
}
