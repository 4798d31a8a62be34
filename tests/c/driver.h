/* What driver_check, storage_check and rows_check share: numbers, configurations, records of what a run leaves. */
#ifndef DRIVER_H
#define DRIVER_H

#include "core.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

static void *checked(void *memory)
{
    if (memory)
        return memory;
    fputs("out of memory\n", stderr);
    exit(2);
}

/* Whether a word is among the program's arguments. */
static bool is_given(int argc, char **argv, const char *word)
{
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], word) == 0)
            return true;
    return false;
}

static uint64_t random_state;

static uint64_t random_bits(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

/* Mostly ordinary numbers; also zeros of both signs and subnormals. */
static double random_value(fo_dtype dtype)
{
    const uint64_t bits = random_bits();
    const double sign = bits & 1 ? -1 : 1, fraction = (double)(bits >> 12) * 0x1p-52;
    if (bits >> 1 & 31)
        return sign * ldexp(1 + fraction, (int)(bits >> 6 & 15) - 12);
    if (bits >> 6 & 1)
        return sign * 0;
    return sign * ldexp(fraction, dtype == FO_F32 ? -126 : -1022);
}

/* ---- configurations -------------------------------------------------------------------------- */

/* A configuration is a rule and a row: in row 0 all hyperparameters have their defaults, and in
 * each other row some have another value. (`few` takes one row of each rule, and not always 0.) */
enum { ROWS = 7, FEW = 9 };

/* The rows in which hyperparameter j has another value than its default, a set of four: so any two
 * of them are seen in all ways, both changed, either and none. */
static unsigned rows_of(int j)
{
    for (unsigned rows = 0;; rows += 2) {
        int n = 0;
        for (int row = 1; row < ROWS; row++)
            n += (rows & 1u << row) != 0;
        if (n == 4 && j-- == 0)
            return rows;
    }
}

/* Another value in the hyperparameter's range. */
static double other_value(const fo_rule *rule, int j)
{
    const double standard = rule->defaults[j];
    const double others[] = {0.7 * standard, 0.3, 1 - standard, 1.1 * standard};
    for (int i = 0; i < COUNT(others); i++)
        if (others[i] != standard && fo_rule_takes(rule, j, others[i]))
            return others[i];
    printf("%s: no other value of %s\n", rule->name, rule->hyper_names[j]);
    exit(2);
}

/* Whether a step keeps state with one value for each row. */
static inline bool keeps_rows(const fo_rule *rule, const double *hypers)
{
    for (int j = 0; rule->slot_names[j]; j++)
        if (fo_rule_slot_by_row(rule, j) && fo_rule_uses_slot(rule, hypers, j))
            return true;
    return false;
}

static void fill_hypers(const fo_rule *rule, int row, int group, double *hypers)
{
    for (int j = 0; rule->hyper_names[j]; j++)
        hypers[j] = rows_of(j) >> row & 1 ? other_value(rule, j) : rule->defaults[j];
    if (group == 1) {
        hypers[0] *= 2;             /* lr */
        hypers[3] = hypers[3] == 0; /* maximize */
    }
}

/* ---- records --------------------------------------------------------------------------------- */

/* What a run leaves: the bytes of all arrays and counters, and whatever else it tells. */
typedef struct {
    char *bytes;
    size_t length, room;
} record;

static void append(record *r, const void *bytes, size_t n)
{
    if (n == 0)
        return;
    if (r->length + n > r->room) {
        r->room = 2 * (r->length + n);
        r->bytes = checked(realloc(r->bytes, r->room));
    }
    memcpy(r->bytes + r->length, bytes, n);
    r->length += n;
}

static inline bool same(const record *a, const record *b)
{
    return a->length == b->length && (a->length == 0 || memcmp(a->bytes, b->bytes, a->length) == 0);
}

static int wrong;

static void expect(bool holds, const char *what, const fo_rule *rule)
{
    if (!holds) {
        wrong++;
        printf("%s: %s\n", rule->name, what);
    }
}

/* FNV-1a over all that the standards hold: equal on every machine, to be compared between them. */
static uint64_t digest = 14695981039346656037u;

static void add_to_digest(const record *r)
{
    for (size_t i = 0; i < r->length; i++)
        digest = (digest ^ (unsigned char)r->bytes[i]) * 1099511628211u;
}

#endif
