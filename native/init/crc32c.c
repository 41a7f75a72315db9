/* CRC32C by tables, eight bytes a step: portable, and fast enough that a FIFO is the bottleneck. */
#include "crc32c.h"

#include "bytes.h"

enum { SLICES = 8 };
static const uint32_t polynomial = 0x82f63b78u;
static uint32_t table[SLICES][256];

void crc32c_init(void) {
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++) crc = (crc >> 1) ^ ((crc & 1) ? polynomial : 0);
        table[0][byte] = crc;
    }
    for (int slice = 1; slice < SLICES; slice++)
        for (int byte = 0; byte < 256; byte++) {
            uint32_t previous = table[slice - 1][byte];
            table[slice][byte] = (previous >> 8) ^ table[0][previous & 0xff];
        }
}

uint32_t crc32c(const uint8_t *data, size_t len) {
    uint32_t crc = ~0u;
    for (; len >= 8; data += 8, len -= 8) {
        uint32_t low = get_u32(data) ^ crc;
        uint32_t high = get_u32(data + 4);
        crc = table[7][low & 0xff] ^ table[6][(low >> 8) & 0xff] ^ table[5][(low >> 16) & 0xff] ^
              table[4][low >> 24] ^ table[3][high & 0xff] ^ table[2][(high >> 8) & 0xff] ^
              table[1][(high >> 16) & 0xff] ^ table[0][high >> 24];
    }
    for (; len > 0; data++, len--) crc = (crc >> 8) ^ table[0][(crc ^ *data) & 0xff];
    return ~crc;
}
