/* What an array may be, by what it is to its parameter: for api.c, which includes it alone. */
#ifndef FO_ARRAYS_H
#define FO_ARRAYS_H

#include "errors.h"
#include "platform.h"

/* What it is: the state array of this number, or one of these. */
enum { PARAM = -3, GRAD = -2, KEPT = -1 }; /* KEPT: the average, or the sum of gradients */

/* Whether it may be of this type. `t` is its parameter, and `rule` the rule of its state; NULL where
 * it is that itself, or no state. */
static bool is_taken(const fo_rule *rule, const fo_tensor *t, int role, fo_dtype dtype)
{
    const fo_storage *storage = &fo_storages[dtype];
    const fo_dtype arithmetic =
        role == PARAM ? storage->arithmetic : fo_storages[t->dtype.of.param].arithmetic;
    const bool exact = role >= 0 && fo_rule_slot_exact(rule, role);
    if (role >= 0 && fo_rule_slot_by_row(rule, role))
        return dtype == arithmetic;
    if (role >= 0 && fo_rule_slot_number(rule, role))
        return dtype == FO_F64;
    if (storage->per != 0) /* 8 bits, or a type that no caller names */
        return role >= 0 && arithmetic == FO_F32 && !exact &&
               dtype == (fo_rule_slot_unsigned(rule, role) ? FO_8BIT_UNSIGNED : FO_8BIT_SIGNED);
    if (role == GRAD && arithmetic == FO_F64)
        return true; /* a double is any of the others exactly */
    return storage->arithmetic == arithmetic &&
           !(exact && storage->bytes < fo_storages[arithmetic].bytes);
}

static fo_status check_type(const char *name, const fo_array *a, const fo_rule *rule,
                            const fo_tensor *t, int role)
{
    char beside[64] = "", types[96] = "";
    if (a->dtype < 0 || a->dtype >= fo_storage_count || a->dtype == FO_BF16_SPLIT ||
        a->dtype == FO_F16_MASTER)
        return fail(FO_UNSUPPORTED, "%s: there is no type %d of elements in this fastopt", name,
                    (int)a->dtype);
    if (is_taken(rule, t, role, a->dtype))
        return FO_OK;
    if (role != PARAM)
        snprintf(beside, sizeof beside, " beside a parameter of type %s",
                 fo_storages[t->dtype.of.param].name);
    for (fo_dtype d = 0; d < fo_storage_count; d++)
        if (is_taken(rule, t, role, d))
            enlist(types, sizeof types, " or ", fo_storages[d].name);
    return fail(FO_UNSUPPORTED, "%s of type %s%s: it must be %s", name, fo_storages[a->dtype].name,
                beside, types);
}

static fo_status check_rounding(const char *name, const fo_array *a, int role)
{
    const char *why = NULL;
    if (a->rounding < FO_NEAREST || a->rounding > FO_STOCHASTIC)
        return fail(FO_BAD_VALUE,
                    "%s: 'rounding' must be 0 (FO_NEAREST) or 1 (FO_STOCHASTIC), got %d", name,
                    (int)a->rounding);
    if (a->rounding == FO_NEAREST)
        return FO_OK;
    if (role == GRAD || role == KEPT)
        why = "only a parameter and its state are rounded at random";
    else if (a->master)
        why = "with a master, a parameter loses nothing";
    else if (fo_storages[a->dtype].bytes >= sizeof(float))
        why = "elements of 32 bits or more lose nothing";
    if (!why)
        return FO_OK;
    return fail(FO_UNSUPPORTED, "%s: 'rounding' must be 0 (FO_NEAREST): %s", name, why);
}

/* Checks the elements of a row: of a gradient of some rows, or of state that has one value for each. */
static fo_status check_row_size(const char *name, const fo_array *a, const fo_tensor *t, int role)
{
    if (a->row_size < 0 || (a->row_size == 0 && role >= 0) ||
        (a->row_size != 0 && t->size % a->row_size != 0))
        return fail(FO_BAD_VALUE,
                    "%s: 'row_size' must %sdivide the parameter's size %lld, got %lld", name,
                    role >= 0 ? "" : "be 0, or ", (long long)t->size, (long long)a->row_size);
    return FO_OK;
}

/* Checks a gradient of some rows; which they are, a step does. */
static fo_status check_rows(const char *name, const fo_array *a)
{
    if (a->n_rows < 0)
        return fail(FO_BAD_VALUE, "%s: 'n_rows' must be 0 or more, got %lld", name,
                    (long long)a->n_rows);
    if (a->n_rows > 0 && (!a->rows || !a->data))
        return fail(FO_BAD_POINTER, "%s of %s must not be NULL: there are %lld rows",
                    a->rows ? "data" : "rows", name, (long long)a->n_rows);
    return FO_OK;
}

/* Checks what an array has beside its elements. */
static fo_status check_fields(const char *name, const fo_array *a, const fo_rule *rule,
                              const fo_tensor *t, int role)
{
    static const char later[] = "this fastopt has no use for it";
    static const char rows[] = "only a gradient of some rows has it, with 'row_size' above 0";
    const bool by_row = role >= 0 && fo_rule_slot_by_row(rule, role);
    const bool bits8 = fo_storages[a->dtype].per != 0;
    const bool bits16 = a->dtype == FO_BF16 || a->dtype == FO_F16;
    const struct {
        const char *name, *why;
        bool wrong;
    } fields[] = {
        {"scales", "only 8-bit state has scales", a->scales && !bits8},
        {"master", "only a bfloat16 or float16 parameter has one",
         a->master && !(bits16 && role == PARAM)},
        {"rows", rows, a->rows && (role != GRAD || a->row_size == 0)},
        {"n_rows", rows, a->n_rows != 0 && (role != GRAD || a->row_size == 0)},
        {"row_size", "only a gradient of some rows has it, and state of one value a row",
         a->row_size != 0 && role != GRAD && !by_row},
        {"seed", "the parameter's is used", a->seed != 0 && role != PARAM},
        {"reserved", later, (a->reserved[0] | a->reserved[1] | a->reserved[2]) != 0},
    };
    for (size_t j = 0; j < sizeof fields / sizeof *fields; j++)
        if (fields[j].wrong)
            return fail(FO_UNSUPPORTED, "%s: '%s' must be 0: %s", name, fields[j].name,
                        fields[j].why);
    if (bits8 && !a->scales && t->size > 0)
        return fail(FO_BAD_POINTER,
                    "scales of %s must not be NULL: there is one for every %d 8-bit elements", name,
                    FO_SCALED);
    fo_status status = check_rounding(name, a, role);
    if (!status && (role == GRAD || by_row))
        status = check_row_size(name, a, t, role);
    return status || role != GRAD || a->row_size == 0 ? status : check_rows(name, a);
}

/* Whether an array has nothing but elements. */
static inline bool is_plain(const fo_array *a)
{
    uint64_t last[2]; /* `rounding` and `reserved` */
    memcpy(last, (const char *)a + offsetof(fo_array, rounding), sizeof last);
    const uintptr_t pointers = (uintptr_t)a->scales | (uintptr_t)a->master | (uintptr_t)a->rows;
    const int64_t numbers = a->n_rows | a->row_size;
    return (pointers | (uint64_t)numbers | a->seed | last[0] | last[1]) == 0;
}
_Static_assert(offsetof(fo_array, rounding) + 2 * sizeof(uint64_t) == sizeof(fo_array), "is_plain");

FO_APART fo_status check_unusual_array(const char *name, const fo_array *a, const fo_rule *rule,
                                       const fo_tensor *t, int role)
{
    fo_status status = check_size("fo_array", a->size, sizeof *a);
    if (!status)
        status = check_type(name, a, rule, t, role);
    return status ? status : check_fields(name, a, rule, t, role);
}

/* Checks an array. Each has a name to blame. A plain one of type `usual` is known to be right. */
static inline fo_status check_array(const char *name, const fo_array *a, fo_dtype usual,
                                    const fo_rule *rule, const fo_tensor *t, int role)
{
    const bool right = a->size == sizeof *a && a->dtype == usual && is_plain(a);
    return right ? FO_OK : check_unusual_array(name, a, rule, t, role);
}

#endif
