/* Random bits for stochastic rounding: of a counter, so that they do not depend on threads, blocks or
 * instruction sets, and a run that goes on draws what it would have drawn. */
#ifndef FO_RANDOM_H
#define FO_RANDOM_H

#include <stdint.h>

#define FO_GOLDEN UINT64_C(0x9e3779b97f4a7c15)

/* The last mixing step of SplitMix64 (Steele, Lea and Flood 2014). */
static inline uint64_t fo_mix64(uint64_t x)
{
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

/* The key of all that `key` is of, and of one number more. */
static inline uint64_t fo_key(uint64_t key, int64_t number)
{
    return fo_mix64((key ^ (uint64_t)number) + FO_GOLDEN);
}

/* A hash of two elements: of number `pair` of those whose indexes have an upper half in common, which
 * is in the key. */
static inline uint32_t fo_hash(uint64_t key, uint32_t pair)
{
    uint32_t h = (uint32_t)key + pair * UINT32_C(0x9e3779b9);
    h = (h ^ h >> 16) * UINT32_C(0x7feb352d) + (uint32_t)(key >> 32);
    h = (h ^ h >> 15) * UINT32_C(0x846ca68b);
    return h ^ h >> 16;
}

/* Of that hash, the bits for an array: those in the lower half are for the first of the two elements.
 * (The upper bits, on which most depends, are others for each array, and for each element.) */
static inline uint32_t fo_bits_for(uint32_t hash, int number)
{
    switch (number & 3) {
    case 0:
        return hash;
    case 1:
        return hash << 16 | hash >> 16;
    case 2:
        return hash << 8 | hash >> 24;
    default:
        return hash << 24 | hash >> 8;
    }
}

#endif
