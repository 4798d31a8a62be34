/* The rules as the driver and the caller see them: names, variants, constants. */
#include "rule.h"
#include "kernels.h"
#include "rules.def"
#include <string.h>

#define FO_HYPER_NAME(name, standard, low, high) #name,
#define FO_HYPER_LOW(name, standard, low, high) low,
#define FO_HYPER_HIGH(name, standard, low, high) high,
#define FO_SLOT_NAME(name, needs) #name,

#define FO_RULE(rule, variants)                                                                    \
    static const char *const rule##_hyper_names[] = {rule##_hyper_list(FO_HYPER_NAME) NULL};       \
    static const rule##_hypers rule##_defaults = {rule##_hyper_list(FO_DEFAULT)};                  \
    static const double rule##_lows[] = {rule##_hyper_list(FO_HYPER_LOW)};                         \
    static const double rule##_highs[] = {rule##_hyper_list(FO_HYPER_HIGH)};                       \
    static const char *const rule##_slot_names[] = {rule##_slot_list(FO_SLOT_NAME) NULL};          \
    _Static_assert(sizeof(rule##_hypers) <= FO_MAX_HYPERS * sizeof(double), "FO_MAX_HYPERS");      \
    _Static_assert((int)rule##_const_count <= FO_MAX_CONSTS, "FO_MAX_CONSTS");
#include "rules.def"
#undef FO_RULE

const fo_rule fo_rules[] = {
#define FO_RULE(rule, variants)                                                                    \
    {.name = #rule,                                                                                \
     .hyper_names = rule##_hyper_names,                                                            \
     .defaults = (const double *)&rule##_defaults,                                                 \
     .lows = rule##_lows,                                                                          \
     .highs = rule##_highs,                                                                        \
     .slot_names = rule##_slot_names,                                                              \
     .slot_needs = {rule##_slot_list(FO_NEEDS)},                                                   \
     .variant = rule##_variant,                                                                    \
     .consts = rule##_consts},
#include "rules.def"
#undef FO_RULE
};

const int fo_rule_count = FO_RULE_COUNT;

const fo_rule *fo_find_rule(const char *name)
{
    for (int i = 0; i < fo_rule_count; i++)
        if (strcmp(fo_rules[i].name, name) == 0)
            return &fo_rules[i];
    return NULL;
}

static const char *nth(const char *const *names, int32_t j)
{
    if (j < 0)
        return NULL;
    while (*names && j-- > 0)
        names++;
    return *names;
}

const char *fo_rule_name(int32_t j)
{
    return j >= 0 && j < fo_rule_count ? fo_rules[j].name : NULL;
}

const char *fo_hyper_name(const char *rule_, int32_t j)
{
    const fo_rule *rule = rule_ ? fo_find_rule(rule_) : NULL;
    return rule ? nth(rule->hyper_names, j) : NULL;
}

const char *fo_state_name(const char *rule_, int32_t j)
{
    const fo_rule *rule = rule_ ? fo_find_rule(rule_) : NULL;
    return rule ? nth(rule->slot_names, j) : NULL;
}

int fo_place_of(const char *const *names, const char *name)
{
    for (int j = 0; names[j]; j++)
        if (strcmp(names[j], name) == 0)
            return j;
    return -1;
}

bool fo_rule_takes(const fo_rule *rule, int j, double value)
{
    if (isnan(rule->highs[j]))
        return value == 0 || value == 1;
    return value >= rule->lows[j] && value <= rule->highs[j];
}

bool fo_rule_uses_slot(const fo_rule *rule, const double *hypers, int slot)
{
    return fo_slot_used(rule->slot_needs[slot], rule->variant(hypers));
}

bool fo_rule_slots_stay(const fo_rule *rule, int variant)
{
    for (int j = 0; j < FO_MAX_SLOTS; j++)
        if (fo_slot_used(rule->slot_needs[j], variant) && !(rule->slot_needs[j] & STAYS))
            return false;
    return true;
}

bool fo_rule_slot_begins(const fo_rule *rule, int slot)
{
    return (rule->slot_needs[slot] & BEGINS) != 0;
}

bool fo_rule_slot_unsigned(const fo_rule *rule, int slot)
{
    return (rule->slot_needs[slot] & UNSIGNED) != 0;
}

bool fo_rule_slot_by_row(const fo_rule *rule, int slot)
{
    return (rule->slot_needs[slot] & BY_ROW) != 0;
}

void fo_rule_row(const fo_rule *rule, double mean, double *value, double *consts)
{
    static void (*const of_rules[])(double, double *, double *) = {
#define FO_RULE_BY_ROW(one) [FO_INDEX_##one] = one##_row,
#include "rules.def"
#undef FO_RULE_BY_ROW
    };
    of_rules[rule - fo_rules](mean, value, consts);
}

bool fo_rule_slot_exact(const fo_rule *rule, int slot)
{
    return (rule->slot_needs[slot] & EXACT) != 0;
}

bool fo_rule_slot_number(const fo_rule *rule, int slot)
{
    return (rule->slot_needs[slot] & NUMBER) != 0;
}

void fo_rule_consts(const fo_rule *rule, const double *hypers, fo_semantics semantics, int64_t t,
                    unsigned fresh, double number, double *consts)
{
    const fo_common_hypers *h = (const fo_common_hypers *)hypers;
    const bool decoupled = h->decoupled_weight_decay != 0;
    consts[L2] = decoupled ? 0 : h->weight_decay;
    consts[KEEP] = decoupled && h->weight_decay != 0 ? 1 - h->lr * h->weight_decay : 1;
    consts[NUMBER_KEPT] = number;
    rule->consts(hypers, semantics, t, fresh, consts);
}
